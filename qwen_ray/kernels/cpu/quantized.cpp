// out = x w^T + bias with weights in 8 or 4 bits; see `quantized.py` for how they are packed.
//
// Activations are rounded first: for weights in 8 bits to 16, each 512 of a row to a scale of their own, and multiplied
// in two halves; for weights in 4 bits to 8, each 64 of a row. Products are integers, exact, and only sums of 512 or 64
// meet the scales. Rows of weights and of x are as independent of each other as in `tile.h`.
#include <memory>

#include "team.h"
#include "tile.h"

namespace {

constexpr int GROUP = 64;                   // bytes of a register
constexpr int64_t PIECE_BYTES = 64 << 10;   // of weights that a thread takes at a time
constexpr int64_t MOST_ROWS = 256;          // of x that are rounded at once

using i8x16 = int8_t __attribute__((vector_size(16)));

// Lane i: sum[i] and the products of its four bytes of w, without a sign, with those of x, which have one.
inline i32x16 multiply_add(i32x16 sum, u32x16 w, i32x16 x) {
#if defined(__AVX512VNNI__)
    return (i32x16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#elif defined(__AVX512BW__)
    __m512i a = (__m512i)w, b = (__m512i)x;
    __m512i even = _mm512_madd_epi16(_mm512_and_si512(a, _mm512_set1_epi16(255)),
                                     _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8));
    return sum + (i32x16)even + (i32x16)_mm512_madd_epi16(_mm512_srli_epi16(a, 8), _mm512_srai_epi16(b, 8));
#else
    for (int j = 0; j < 4; ++j) sum += (i32x16)((w >> (8 * j)) & 255) * ((x << (24 - 8 * j)) >> 24);
    return sum;
#endif
}

// The scale of numbers that shall reach up to `limit`, of which `most` holds the largest sizes; NaN if `spoilt` is.
struct Scale {
    float value, inverse;

    Scale(f32x16 most, f32x16 spoilt, float limit) {
        float scale = largest(most) / limit;
        inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        value = scale + sum(spoilt);
    }
};

inline i32x16 nearest(f32x16 v) { return (i32x16)(v + 12582912.0f) - 0x4b400000; }

// What the bytes of weights are too large by is known beforehand, and so is its part of the sums: `starts`.
constexpr int OFFSET = 128;

// Rows of x in 16 bits: 256 times a byte, and another.
struct Rounded16 {
    static constexpr int STEPS = 8, SIZE = STEPS * GROUP;
    struct alignas(64) Group {
        int8_t high[STEPS][GROUP], low[STEPS][GROUP];
        int32_t starts[16];
        float scale;
    };
    int64_t num_groups;
    std::unique_ptr<Group[]> groups;  // [rows, num_groups]

    Rounded16(int64_t num_rows, int64_t num_steps, int64_t)
        : num_groups((num_steps + STEPS - 1) / STEPS), groups(new Group[num_rows * num_groups]) {}

    template <class T>
    void take(int64_t row, const T* from, int64_t size) {
        for (int64_t g = 0; g < num_groups; ++g) {
            constexpr int VECTORS = SIZE / 16;
            f32x16 v[VECTORS], most{}, spoilt{};
            for (int i = 0; i < VECTORS; ++i) {
                v[i] = load_up_to_16(from + g * SIZE + 16 * i, size - g * SIZE - 16 * i);
                most = larger(larger(most, v[i]), -v[i]);
                spoilt += v[i] - v[i];  // 0, or NaN where one is not finite
            }
            Scale scale(most, spoilt, 127.0f * 256.0f);
            Group& to = groups[row * num_groups + g];
            i32x16 total{};
            for (int i = 0; i < VECTORS; ++i) {
                i32x16 whole = nearest(v[i] * scale.inverse), low = (whole << 24) >> 24;
                save(to.high[0] + 16 * i, __builtin_convertvector((whole - low) >> 8, i8x16));
                save(to.low[0] + 16 * i, __builtin_convertvector(low, i8x16));
                total += whole;
            }
            save(to.starts, total * -OFFSET);
            to.scale = scale.value;
        }
    }
};

// Rows of x in 8 bits, and the totals of what meets a group of weights.
struct Rounded8 {
    struct alignas(64) Group {
        int8_t values[GROUP];
    };
    int64_t num_groups, num_totals, total_size;
    std::unique_ptr<Group[]> groups;   // [rows, num_groups]
    std::unique_ptr<float[]> scales;   // [rows, num_groups]
    std::unique_ptr<float[]> totals;   // [rows, num_totals rounded up to 16]

    Rounded8(int64_t num_rows, int64_t num_steps, int64_t total_size)
        : num_groups(num_steps),
          num_totals((num_steps * GROUP / total_size + 15) / 16 * 16),
          total_size(total_size),
          groups(new Group[num_rows * num_groups]),
          scales(new float[num_rows * num_groups]),
          totals(new float[num_rows * num_totals]()) {}

    template <class T>
    void take(int64_t row, const T* from, int64_t size) {
        for (int64_t g = 0; g < num_groups; ++g) {
            f32x16 v[4], most{}, spoilt{};
            for (int i = 0; i < 4; ++i) {
                v[i] = load_up_to_16(from + g * GROUP + 16 * i, size - g * GROUP - 16 * i);
                most = larger(larger(most, v[i]), -v[i]);
                spoilt += v[i] - v[i];
            }
            Scale scale(most, spoilt, 127.0f);
            for (int i = 0; i < 4; ++i) {
                i32x16 whole = nearest(v[i] * scale.inverse);
                save(groups[row * num_groups + g].values + 16 * i, __builtin_convertvector(whole, i8x16));
                totals[row * num_totals + (g * GROUP + 16 * i) / total_size] +=
                    sum(__builtin_convertvector(whole, f32x16)) * scale.value;
            }
            scales[row * num_groups + g] = scale.value;
        }
    }
};

struct Weights {
    const uint8_t* values;
    int64_t row_bytes;
    const void* scales;
    const fp16* least;  // the scales are fp16 as well, where there are such
    int group;  // 0: 8 bits

    // Scales of 128 weights of a row in 4 bits, for the lanes of their first and of their second 64.
    void scales_of(int64_t row, int64_t block, f32x16 (&to)[2]) const {
        const fp16* from = (const fp16*)scales + (row * (row_bytes / 64) + block) * (128 / group);
        if (group == 128) {
            to[0] = to[1] = fill(from[0]);
        } else if (group == 64) {
            to[0] = fill(from[0]), to[1] = fill(from[1]);
        } else {
            f32x16 four = load_up_to_16(from, 4);
            to[0] = SHUFFLE(four, four, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
            to[1] = SHUFFLE(four, four, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
        }
    }
};

// Lane c * R + r: row first + r of the weights times row column + c of x.
template <int R, int C>
[[gnu::noinline]] f32x16 tile(const Weights& w, int64_t first, const Rounded16& x, int64_t column, int64_t ahead) {
    f32x16 sums[R * C] = {};
    const uint8_t* rows = w.values + first * w.row_bytes;
    for (int64_t g = 0, left = w.row_bytes / GROUP; g < x.num_groups; ++g, left -= Rounded16::STEPS) {
        const Rounded16::Group* groups[C];
        for (int c = 0; c < C; ++c) groups[c] = &x.groups[(column + c) * x.num_groups + g];
        i32x16 whole[R * C] = {};
        int steps = left < Rounded16::STEPS ? left : Rounded16::STEPS;
        auto add = [&](auto half, int k) __attribute__((always_inline)) {
            u32x16 a[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const uint8_t* at = rows + r * w.row_bytes + (g * Rounded16::STEPS + k) * GROUP;
                if (!half) __builtin_prefetch(at + ahead);
                a[r] = load<u32x16>(at);
            }
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                i32x16 b = load<i32x16>(half ? groups[c]->low[k] : groups[c]->high[k]);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) whole[c * R + r] = multiply_add(whole[c * R + r], a[r], b);
            }
        };
        for (int k = 0; k < steps; ++k) add(std::false_type{}, k);
#pragma GCC unroll 16
        for (int i = 0; i < R * C; ++i) whole[i] <<= 8;
        for (int k = 0; k < steps; ++k) add(std::true_type{}, k);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            i32x16 start = load<i32x16>(groups[c]->starts);
            f32x16 scale = fill(groups[c]->scale);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
                sums[c * R + r] += __builtin_convertvector(whole[c * R + r] + start, f32x16) * scale;
        }
    }
    return add_lanes<R * C>(sums);
}

template <int R, int C>
[[gnu::noinline]] f32x16 tile(const Weights& w, int64_t first, const Rounded8& x, int64_t column, int64_t ahead) {
    f32x16 sums[R * C] = {};
    const uint8_t* rows = w.values + first * w.row_bytes;
    int64_t from = column * x.num_groups;
    for (int64_t block = 0; block < x.num_groups / 2; ++block) {
        u32x16 a[R][2];
        f32x16 scales[R][2];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const uint8_t* at = rows + r * w.row_bytes + block * 64;
            __builtin_prefetch(at + ahead);
            u32x16 bytes = load<u32x16>(at);
            a[r][0] = bytes & 0x0f0f0f0fu;
            a[r][1] = (bytes >> 4) & 0x0f0f0f0fu;
            w.scales_of(first + r, block, scales[r]);
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half)
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                int64_t g = from + c * x.num_groups + block * 2 + half;
                i32x16 b = load<i32x16>(x.groups[g].values);
                f32x16 scale = fill(x.scales[g]);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    f32x16 v = __builtin_convertvector(multiply_add(i32x16{}, a[r][half], b), f32x16);
                    sums[c * R + r] += v * (scale * scales[r][half]);
                }
            }
    }
    int64_t num_least = w.row_bytes * 2 / w.group;
    for (int64_t g = 0; g < num_least; g += 16)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            f32x16 least = load_up_to_16(w.least + (first + r) * num_least + g, num_least - g);
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c)
                sums[c * R + r] += least * load<f32x16>(x.totals.get() + (column + c) * x.num_totals + g);
        }
    return add_lanes<R * C>(sums);
}

template <int R, class X>
inline f32x16 tile_of(int width, const Weights& w, int64_t first, const X& x, int64_t column, int64_t ahead) {
    if constexpr (COLUMNS == 4) {
        if (width == 4) return tile<R, 4>(w, first, x, column, ahead);
        if (width == 3) return tile<R, 3>(w, first, x, column, ahead);
    }
    return width == 2 ? tile<R, 2>(w, first, x, column, ahead) : tile<R, 1>(w, first, x, column, ahead);
}

template <int N, class X, class T>
inline void rows(const Weights& w, int64_t row, const X& x, int64_t num_columns, const T* bias, T* out,
                 int64_t out_size) {
    for (int64_t c = 0; c < num_columns; c += COLUMNS) {
        int width = num_columns - c < COLUMNS ? num_columns - c : COLUMNS;
        f32x16 v = tile_of<N>(width, w, row, x, c, c == 0 ? ROWS * w.row_bytes : 0);
        if (!w.group) v *= gather<float, N>(width, [&](int) { return (const float*)w.scales + row; });
        if (bias) v += gather<T, N>(width, [&](int) { return bias + row; });
        scatter<T, N>(v, width, [&](int j) { return out + (c + j) * out_size + row; });
    }
}

template <class X, class T>
void multiply_rounded(const T* x, int64_t x_stride, const Matrix& matrix, T* out, int64_t num_rows) {
    Weights w{(const uint8_t*)matrix.values, matrix.row_bytes, matrix.scales, (const fp16*)matrix.least, matrix.group};
    const T* bias = (const T*)matrix.bias;
    int64_t size = matrix.size, out_size = matrix.out_size;
    int64_t num_steps = w.row_bytes * (w.group ? 2 : 1) / GROUP;
    int64_t piece = PIECE_BYTES / (w.row_bytes + 1) / ROWS * ROWS;
    piece = piece < ROWS ? ROWS : piece;
    int64_t num_pieces = (out_size + piece - 1) / piece;
    for (int64_t begin = 0; begin < num_rows; begin += MOST_ROWS) {
        int64_t count = num_rows - begin < MOST_ROWS ? num_rows - begin : MOST_ROWS;
        auto take = [&](X& to, int64_t c) { to.take(c, x + (begin + c) * x_stride, size); };
        auto own = made_ready<X>(count, take, num_steps, int64_t(w.group));
        T* to = out + begin * out_size;
#pragma omp for schedule(dynamic)
        for (int64_t p = 0; p < num_pieces; ++p) {
            int64_t r = p * piece, end = r + piece < out_size ? r + piece : out_size;
            for (; r + ROWS <= end; r += ROWS) rows<ROWS>(w, r, *own, count, bias, to, out_size);
            for (; r < end; ++r) rows<1>(w, r, *own, count, bias, to, out_size);
        }
    }
}

}  // namespace

template <class T>
void multiply_packed(const T* x, int64_t x_stride, const Matrix& w, T* out, int64_t num_rows) {
    if (w.group)
        multiply_rounded<Rounded8>(x, x_stride, w, out, num_rows);
    else
        multiply_rounded<Rounded16>(x, x_stride, w, out, num_rows);
}
template void multiply_packed<float>(const float*, int64_t, const Matrix&, float*, int64_t);
template void multiply_packed<bf16>(const bf16*, int64_t, const Matrix&, bf16*, int64_t);
