// Functions of one element: activations, their gated forms, and the rest of the unary table.
//
// The kind is an argument: one kernel a type, whose branch all threads take alike.
#include "activation.cuh"
#include "pack.cuh"

#define EACH_ELEMENT _Pragma("unroll") for (int e = 0; e < N; e++)

// x[e] = F(x[e])
template <class F, class T, int N> __device__ __forceinline__ void value_of(Elements<T, N> &x) {
    float y[N];
    EACH_ELEMENT y[e] = F::value(x[e], F::template parts<T>(x[e]));
    x.put(y);
}

// dy[e] = dy[e] F'(x[e])
template <class F, class T, int N>
__device__ __forceinline__ void slope_of(const Elements<T, N> &x, Elements<T, N> &dy) {
    float dx[N];
    EACH_ELEMENT dx[e] = dy[e] * F::slope(x[e], F::template parts<T>(x[e]));
    dy.put(dx);
}

template <class T> __device__ void activation(int kind, const T *x, T *y, i64 count) {
    bool wide = aligned16(x) && aligned16(y);
    stream<Wide<T>::N>(
        count, wide, [&](auto n, i64 first) { return load<COUNT(n)>(x + first); },
        [&](auto n, i64 first, auto &at) {
            switch (kind) {
            case GELU: value_of<Gelu>(at); break;
            case GELU_TANH: value_of<GeluTanh>(at); break;
            case RELU: value_of<Relu>(at); break;
            case TANH: value_of<Tanh>(at); break;
            default: value_of<Silu>(at);
            }
            store(y + first, at);
        });
}

// dx may be dy.
template <class T>
__device__ void activation_backward(int kind, const T *x, const T *dy, T *dx, i64 count) {
    bool wide = aligned16(x) && aligned16(dy) && aligned16(dx);
    stream<Wide<T>::N>(
        count, wide, [&](auto n, i64 first) { return load<COUNT(n)>(x, dy, first); },
        [&](auto n, i64 first, auto &of) {
            switch (kind) {
            case GELU: slope_of<Gelu>(of.a, of.b); break;
            case GELU_TANH: slope_of<GeluTanh>(of.a, of.b); break;
            case RELU: slope_of<Relu>(of.a, of.b); break;
            case TANH: slope_of<Tanh>(of.a, of.b); break;
            default: slope_of<Silu>(of.a, of.b);
            }
            store(dx + first, of.b);
        });
}

// --- Gated units. Kinds as in activation.rs.

enum Glu { SWIGLU, GEGLU, GEGLU_TANH };

// up[e] = F(gate[e]) up[e]
template <class F, class T, int N>
__device__ __forceinline__ void gate_of(const Elements<T, N> &gate, Elements<T, N> &up) {
    float y[N];
    EACH_ELEMENT y[e] = F::value(gate[e], F::template parts<T>(gate[e])) * up[e];
    up.put(y);
}

template <class T> __device__ void glu(int kind, const T *gate, const T *up, T *y, i64 count) {
    bool wide = aligned16(gate) && aligned16(up) && aligned16(y);
    stream<Wide<T>::N>(
        count, wide, [&](auto n, i64 first) { return load<COUNT(n)>(gate, up, first); },
        [&](auto n, i64 first, auto &of) {
            switch (kind) {
            case SWIGLU: gate_of<Silu>(of.a, of.b); break;
            case GEGLU: gate_of<Gelu>(of.a, of.b); break;
            default: gate_of<GeluTanh>(of.a, of.b);
            }
            store(y + first, of.b);
        });
}

// gate[e] becomes its gradient, up[e] that of up.
template <class F, class T, int N>
__device__ __forceinline__ void gate_slope_of(Elements<T, N> &gate, Elements<T, N> &up,
                                              const Elements<T, N> &dy) {
    float dgate[N], dup[N];
    EACH_ELEMENT {
        Parts parts = F::template parts<T>(gate[e]);
        dgate[e] = dy[e] * up[e] * F::slope(gate[e], parts);
        dup[e] = dy[e] * F::value(gate[e], parts);
    }
    gate.put(dgate);
    up.put(dup);
}

// dgate and dup where they are not null.
template <class T>
__device__ void glu_backward(int kind, const T *gate, const T *up, const T *dy, T *dgate, T *dup,
                             i64 count) {
    bool wide = aligned16(gate) && aligned16(up) && aligned16(dy) && aligned16(dgate) && aligned16(dup);
    stream<Wide<T>::N>(
        count, wide, [&](auto n, i64 first) { return load<COUNT(n)>(gate, up, dy, first); },
        [&](auto n, i64 first, auto &of) {
            switch (kind) {
            case SWIGLU: gate_slope_of<Silu>(of.a, of.b, of.c); break;
            case GEGLU: gate_slope_of<Gelu>(of.a, of.b, of.c); break;
            default: gate_slope_of<GeluTanh>(of.a, of.b, of.c);
            }
            if (dgate) store(dgate + first, of.a);
            if (dup) store(dup + first, of.b);
        });
}

// --- The functions of the unary table that are no activations.

enum Unary { EXP, LN, SQRT, SIGMOID, NEG, ABS, SQUARE, RECIPROCAL, ERF, SIN, COS };

// As functions of their own: each has a rare path for large arguments that is long.
__device__ __noinline__ float sine(float x) { return sinf(x); }
__device__ __noinline__ float cosine(float x) { return cosf(x); }

template <class T> __device__ void unary(int kind, const T *x, T *y, i64 count) {
    bool wide = aligned16(x) && aligned16(y);
    stream<Wide<T>::N>(
        count, wide, [&](auto n, i64 first) { return load<COUNT(n)>(x + first); },
        [&](auto n, i64 first, auto &at) {
            constexpr int N = COUNT(n);
            float result[N];
#define VALUE(KIND, expression)                                                                    \
    case KIND:                                                                                     \
        EACH_ELEMENT {                                                                             \
            float v = at[e];                                                                       \
            result[e] = expression;                                                                \
        }                                                                                          \
        break;
            switch (kind) {
                VALUE(EXP, expf(v))
                VALUE(LN, logf(v))
                VALUE(SQRT, sqrtf(v))
                VALUE(SIGMOID, logistic_parts(v).gate)
                VALUE(NEG, -v)
                VALUE(ABS, fabsf(v))
                VALUE(SQUARE, v * v)
                VALUE(RECIPROCAL, 1.f / v)
                VALUE(ERF, erff(v))
                VALUE(SIN, sine(v))
                VALUE(COS, cosine(v))
            }
#undef VALUE
            at.put(result);
            store(y + first, at);
        });
}

// Those of the table whose slope is not in `activation_backward`: with TANH and RELU from the value.
enum UnarySlope { TANH_VALUE = 11, RELU_VALUE = 12 };

// `saved` is what the slope is computed from, x or y; for NEG it is dy. dx may be dy.
template <class T>
__device__ void unary_backward(int kind, const T *saved, const T *dy, T *dx, i64 count) {
    bool wide = aligned16(saved) && aligned16(dy) && aligned16(dx);
    stream<Wide<T>::N>(
        count, wide, [&](auto n, i64 first) { return load<COUNT(n)>(saved, dy, first); },
        [&](auto n, i64 first, auto &of) {
            constexpr int N = COUNT(n);
            float result[N];
#define SLOPE(KIND, expression)                                                                    \
    case KIND:                                                                                     \
        EACH_ELEMENT {                                                                             \
            float v = of.a[e];                                                                     \
            result[e] = of.b[e] * (expression);                                                    \
        }                                                                                          \
        break;
            switch (kind) {
                SLOPE(EXP, v)
                SLOPE(LN, 1.f / v)
                SLOPE(SQRT, 0.5f / v)
                SLOPE(SIGMOID, v * (1.f - v))
                SLOPE(NEG, -1.f)
                SLOPE(ABS, v < 0.f ? -1.f : v > 0.f ? 1.f : v)
                SLOPE(SQUARE, v + v)
                SLOPE(RECIPROCAL, -(v * v))
                SLOPE(ERF, 1.12837917f * expf(-(v * v)))
                SLOPE(SIN, cosine(v))
                SLOPE(COS, -sine(v))
                SLOPE(TANH_VALUE, fmaf(-v, v, 1.f))
                SLOPE(RELU_VALUE, v > 0.f ? 1.f : 0.f)
            }
#undef SLOPE
            of.b.put(result);
            store(dx + first, of.b);
        });
}

// y = x scale + shift
template <class T> __device__ void affine(const T *x, float scale, float shift, T *y, i64 count) {
    bool wide = aligned16(x) && aligned16(y);
    stream<Wide<T>::N>(
        count, wide, [&](auto n, i64 first) { return load<COUNT(n)>(x + first); },
        [&](auto n, i64 first, auto &at) {
            constexpr int N = COUNT(n);
            float result[N];
            EACH_ELEMENT result[e] = fmaf(at[e], scale, shift);
            at.put(result);
            store(y + first, at);
        });
}

#define KERNELS(T, name)                                                                           \
    EXPORT activation_##name(int kind, const T *x, T *y, i64 count) {                              \
        activation(kind, x, y, count);                                                             \
    }                                                                                              \
    EXPORT activation_backward_##name(int kind, const T *x, const T *dy, T *dx, i64 count) {       \
        activation_backward(kind, x, dy, dx, count);                                               \
    }                                                                                              \
    EXPORT glu_##name(int kind, const T *gate, const T *up, T *y, i64 count) {                     \
        glu(kind, gate, up, y, count);                                                             \
    }                                                                                              \
    EXPORT glu_backward_##name(int kind, const T *gate, const T *up, const T *dy, T *dgate,        \
                               T *dup, i64 count) {                                                \
        glu_backward(kind, gate, up, dy, dgate, dup, count);                                       \
    }                                                                                              \
    EXPORT unary_##name(int kind, const T *x, T *y, i64 count) { unary(kind, x, y, count); }       \
    EXPORT unary_backward_##name(int kind, const T *saved, const T *dy, T *dx, i64 count) {        \
        unary_backward(kind, saved, dy, dx, count);                                                \
    }                                                                                              \
    EXPORT affine_##name(const T *x, float scale, float shift, T *y, i64 count) {                  \
        affine(x, scale, shift, y, count);                                                         \
    }
KERNELS(float, f32)
KERNELS(bf16, bf16)
