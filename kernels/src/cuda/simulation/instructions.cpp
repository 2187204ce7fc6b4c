// Instructions that a warp executes as one: matrices from shared memory, products.
#include "scheduler.hpp"

namespace simulation {

namespace {

float half_of(unsigned word, int half) { return __uint_as_float(half ? word & 0xffff0000u : word << 16); }

uint64_t bits_of(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

// Biased, as a double has it; 0 for zero. No number here is small enough to be subnormal as a double.
int exponent(double x) { return (int)(bits_of(x) >> 52 & 0x7ff); }

// x without what is less than 2^(place - 1023), towards zero.
double cut(double x, int place) {
    int dropped = place - (exponent(x) - 52);
    if (dropped <= 0) return x;
    uint64_t bits = dropped > 52 ? bits_of(x) & (uint64_t)1 << 63 : bits_of(x) >> dropped << dropped;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// Of an f32 whose first bit has this exponent, the last one: there are 24, and none below 2^-149.
int last_place(int exponent) {
    const int SMALLEST = 1023 - 126;
    return (exponent < SMALLEST ? SMALLEST : exponent) - 23;
}

// c + the sum of four products, as tensor cores form it: every one is cut at the place of the last bit
// of the largest, and the sum to an f32. That is how an A100 adds products of TF32 numbers, but for one
// more bit that it keeps when it aligns them; an H100 adds eight at a time and keeps two more. (Fasi,
// Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021; Khattak and Mikaitis,
// "Accurate models of NVIDIA tensor cores", 2025.) So devices are a little more accurate than this.
float sum_of_four(float c, const float *a, const float *b) {
    double terms[5] = {c};
    int most = exponent(c);
    bool finite = std::isfinite(c);
    for (int k = 0; k < 4; k++) {
        double x = (double)a[k] * b[k]; // of 22 bits
        terms[1 + k] = x;
        int own = exponent(x);
        most = own > most ? own : most;
        finite &= own != 0x7ff;
    }
    double sum = 0;
    int place = last_place(most);
    for (double x : terms) sum += finite ? cut(x, place) : x;
    if (!finite) return (float)sum;
    sum = cut(sum, last_place(exponent(sum)));
    return std::fabs(sum) < 0x1p128 ? (float)sum : std::copysign(INFINITY, (float)sum);
}

// What a lane gives to a product of its warp.
struct Given {
    float d[4];
    unsigned a[4], b[2];
};

Given given(Exchange &e, int lane) {
    Given in;
    memcpy(&in, e.in[lane], sizeof in);
    return in;
}

// Each lane's part of the sums: with g = lane / 4 and t = lane % 4, rows g, g, g + 8, g + 8 of columns 2t, 2t + 1,
// 2t, 2t + 1.
void give(Exchange &e, const float (&D)[16][8]) {
    for (int lane = 0; lane < 32; lane++) {
        int g = lane / 4, t = lane % 4;
        float out[4] = {D[g][2 * t], D[g][2 * t + 1], D[g + 8][2 * t], D[g + 8][2 * t + 1]};
        memcpy(e.out[lane], out, sizeof out);
    }
}

// d = what `product` makes of what all lanes give.
void multiply(const void *operation, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
              Combine product) {
    Given in = {{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    exchange(operation, 0xffffffffu, &in, sizeof in, d, sizeof d, product, nullptr);
}

} // namespace

// Lane l gives the address of row l % 8 of matrix l / 8; lane l gets, of each matrix, elements
// 2 * (l % 4) and the next of row l / 4, or of column l / 4.
void load_matrices(const void *operation, unsigned (&r)[4], const void *row, bool transposed) {
    struct Four {
        unsigned at[4];
    } four;
    // The rows are read by those who name them, whoever gets them.
    races::access(running_thread(), row, 16, races::READ, __builtin_return_address(0));
    exchange(
        operation, 0xffffffffu, &row, sizeof row, &four, sizeof four,
        [](Exchange &e, unsigned, const void *context) {
            bool transposed = *(const bool *)context;
            const uint16_t *rows[32];
            for (int lane = 0; lane < 32; lane++) {
                memcpy(&rows[lane], e.in[lane], sizeof rows[lane]);
                if ((uintptr_t)rows[lane] % 16 != 0) fail("ldmatrix: a row is not 16-byte aligned");
            }
            for (int lane = 0; lane < 32; lane++) {
                Four four;
                for (int matrix = 0; matrix < 4; matrix++) {
                    unsigned word = 0;
                    for (int i = 0; i < 2; i++) {
                        int across = 2 * (lane % 4) + i, down = lane / 4;
                        uint16_t x = transposed ? rows[8 * matrix + across][down]
                                                : rows[8 * matrix + down][across];
                        word |= (unsigned)x << (16 * i);
                    }
                    four.at[matrix] = word;
                }
                memcpy(e.out[lane], &four, sizeof four);
            }
        },
        &transposed);
    memcpy(r, &four, sizeof four);
}

// With g = lane / 4 and t = lane % 4: a[0..3] hold rows g, g + 8, g, g + 8 and columns 2t, 2t, 2t +
// 8, 2t + 8 (and the next); b0, b1 rows 2t and 2t + 8 (and the next) of column g; d rows g, g, g + 8,
// g + 8 of columns 2t, 2t + 1, 2t, 2t + 1.
void multiply_16816(const void *operation, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    multiply(operation, d, a, b0, b1, [](Exchange &e, unsigned, const void *) {
        float A[16][16], B[16][8], D[16][8];
        for (int lane = 0; lane < 32; lane++) {
            Given in = given(e, lane);
            int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 2; i++) {
                A[g][2 * t + i] = half_of(in.a[0], i);
                A[g + 8][2 * t + i] = half_of(in.a[1], i);
                A[g][2 * t + 8 + i] = half_of(in.a[2], i);
                A[g + 8][2 * t + 8 + i] = half_of(in.a[3], i);
                B[2 * t + i][g] = half_of(in.b[0], i);
                B[2 * t + 8 + i][g] = half_of(in.b[1], i);
                D[g][2 * t + i] = in.d[i];
                D[g + 8][2 * t + i] = in.d[2 + i];
            }
        }
        for (int k = 0; k < 16; k++)
            for (int row = 0; row < 16; row++)
                for (int column = 0; column < 8; column++) D[row][column] += A[row][k] * B[k][column];
        give(e, D);
    });
}

// With g = lane / 4 and t = lane % 4: a[0..3] hold rows g, g + 8, g, g + 8 of columns t, t, t + 4, t +
// 4; b0, b1 rows t and t + 4 of column g; d as above. The last 13 bits of factors do not count.
void multiply_tf32(const void *operation, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    multiply(operation, d, a, b0, b1, [](Exchange &e, unsigned, const void *) {
        float A[16][8], B[8][8], D[16][8]; // B by columns
        bool in_row[16] = {}, in_column[8] = {}, finite = true;
        auto take = [&](unsigned word, float &to, bool &any) {
            to = __uint_as_float(word & 0xffffe000u);
            any |= to != 0;
            finite &= std::isfinite(to);
        };
        for (int lane = 0; lane < 32; lane++) {
            Given in = given(e, lane);
            int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 4; i++) {
                int row = g + i % 2 * 8, column = t + i / 2 * 4;
                take(in.a[i], A[row][column], in_row[row]);
                D[g + i / 2 * 8][2 * t + i % 2] = in.d[i];
            }
            for (int i = 0; i < 2; i++) take(in.b[i], B[g][t + 4 * i], in_column[g]);
        }
        for (int row = 0; row < 16; row++) {
            for (int column = 0; column < 8; column++) {
                // Zeros add nothing, of which tiles have many.
                if (finite && !(in_row[row] && in_column[column])) continue;
                float &sum = D[row][column];
                for (int k = 0; k < 8; k += 4) sum = sum_of_four(sum, A[row] + k, B[column] + k);
            }
        }
        give(e, D);
    });
}

} // namespace simulation
