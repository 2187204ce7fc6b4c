// Instructions that a warp executes as one: matrices from shared memory, products.
#include "scheduler.hpp"

namespace simulation {

namespace {

float half_of(unsigned word, int half) { return __uint_as_float(half ? word & 0xffff0000u : word << 16); }

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
    struct In {
        float d[4];
        unsigned a[4], b[2];
    } in;
    memcpy(in.d, d, sizeof in.d);
    memcpy(in.a, a, sizeof in.a);
    in.b[0] = b0;
    in.b[1] = b1;
    float out[4];
    exchange(
        operation, 0xffffffffu, &in, sizeof in, out, sizeof out,
        [](Exchange &e, unsigned, const void *) {
            float A[16][16], B[16][8], D[16][8];
            for (int lane = 0; lane < 32; lane++) {
                In in;
                memcpy(&in, e.in[lane], sizeof in);
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
            for (int lane = 0; lane < 32; lane++) {
                int g = lane / 4, t = lane % 4;
                float out[4] = {D[g][2 * t], D[g][2 * t + 1], D[g + 8][2 * t], D[g + 8][2 * t + 1]};
                memcpy(e.out[lane], out, sizeof out);
            }
        },
        nullptr);
    memcpy(d, out, sizeof out);
}

} // namespace simulation
