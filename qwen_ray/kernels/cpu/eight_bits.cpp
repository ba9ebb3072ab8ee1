// Weights in 8 bits: `lanes.h` with a byte for each, 128 more than the weight is, and a scale for each row.
#include "lanes.h"

namespace {

constexpr int OFFSET = 128;

struct EightBits {
    static constexpr int PARTS = 1;
    const uint8_t* values;  // [blocks][columns / 4][LANES][4]
    const float* scales;    // [blocks][LANES]
    int64_t block_bytes;

    EightBits(const Matrix& w, int64_t block)
        : values((const uint8_t*)w.values + block * w.row_bytes * LANES),
          scales((const float*)w.scales + block * LANES),
          block_bytes(w.row_bytes * LANES) {}

    const uint8_t* at(int b, int64_t g, int q) const { return values + b * block_bytes + (g * QUADS + q) * 4 * LANES; }

    template <int C>
    void fours(int b, int64_t g, int q, u32x16 (&two)[2]) const {
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            if (C > 1) ask_ahead(at(b, g, q + i));  // one row of x keeps up with what processors foresee
            two[i] = load<u32x16>(at(b, g, q + i));
        }
    }

    template <int C>
    void add(f32x16* sums, const i32x16* whole, int, int64_t, int, const Rounded::Group& x) const {
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            float total = x.totals[c][0] + x.totals[c][1];
            sums[c] += (to_float(whole[c]) - OFFSET * total) * x.scales[c];
        }
    }

    f32x16 spike(int b, const Rounded::Spike& spike) const {
        i32x16 whole = multiply_add(i32x16{}, load<u32x16>(at(b, 0, spike.four)), i32x16{} + spike.bytes);
        return to_float(whole) * spike.scale;
    }

    f32x16 finish(int b, f32x16 sums) const { return sums * load<f32x16>(scales + b * LANES); }
};

}  // namespace

template <class T>
void multiply_eight_bits(Team& team, const T* x, int64_t x_stride, const Share* shares, int64_t num_shares, T* out) {
    multiply_lanes<EightBits>(team, x, x_stride, shares, num_shares, out);
}
template void multiply_eight_bits<float>(Team&, const float*, int64_t, const Share*, int64_t, float*);
template void multiply_eight_bits<bf16>(Team&, const bf16*, int64_t, const Share*, int64_t, bf16*);
