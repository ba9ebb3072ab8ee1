// Weights in 8 bits: `lanes.h` with a byte for each, 128 more than the weight is, and a scale for each row.
#include "lanes.h"

namespace {

constexpr int OFFSET = 128;

struct EightBits {
    static constexpr int PARTS = 1;
    const uint8_t* values;  // [columns / 4][LANES][4]
    const float* scales;    // [LANES]

    EightBits(const Matrix& w, int64_t block)
        : values((const uint8_t*)w.values + block * w.row_bytes * LANES),
          scales((const float*)w.scales + block * LANES) {}

    u32x16 four(int64_t g, int q) const { return load<u32x16>(values + (g * QUADS + q) * 4 * LANES); }

    template <int C>
    void fours(int64_t g, int q, u32x16 (&two)[2]) const {
        if (C > 1) {  // one row of x keeps up with what processors foresee
            ask_ahead(values + (g * QUADS + q) * 4 * LANES);
            ask_ahead(values + (g * QUADS + q + 1) * 4 * LANES);
        }
        two[0] = four(g, q);
        two[1] = four(g, q + 1);
    }

    template <int C>
    void add(f32x16* sums, const i32x16* whole, int64_t, int, const Rounded::Facts* facts) const {
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sums[c] = __builtin_convertvector(whole[c] - OFFSET * facts[c].total, f32x16);
    }

    f32x16 finish(f32x16 sums) const { return sums * load<f32x16>(scales); }
};

}  // namespace

template <class T>
void multiply_eight_bits(Team& team, const T* x, int64_t x_stride, const Matrix& w, T* out, int64_t num_rows) {
    multiply_lanes<EightBits>(team, x, x_stride, w, out, num_rows);
}
template void multiply_eight_bits<float>(Team&, const float*, int64_t, const Matrix&, float*, int64_t);
template void multiply_eight_bits<bf16>(Team&, const bf16*, int64_t, const Matrix&, bf16*, int64_t);
