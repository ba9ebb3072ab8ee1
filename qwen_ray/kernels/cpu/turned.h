// A matrix product for many rows of x: sixteen rows of weights are turned first, so that a lane is a row of weights.
//
// A tile of `tile.h` reads as many activations as weights from a cache, and adds up the lanes of each of its results. Here
// a weight meets all rows of x once it is turned, and lanes stay apart. To the last bit it is the same: what is lane j
// there is run j of factors here, one run is added up after the other, and runs are added to each other as `add_lanes`
// adds lanes.
#pragma once

#include <memory>

#include "tile.h"

constexpr int64_t TURNED = 16;  // rows of weights of a block: lanes
constexpr int RUNS = 16;        // that factors are in
#if defined(__AVX512F__)
constexpr int BLOCKS = 2, PANEL = 8;  // blocks, rows of x: half of 32 registers hold sums
#else
constexpr int BLOCKS = 1, PANEL = 4;
#endif

// In which order runs follow each other, so that each sum of two of them can be made at once.
constexpr int RUN_AT[RUNS] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};

// Of sixteen rows, those behind `num_rows` being zeros: save(run, f, factor f of that run of all sixteen).
template <class T, class Save>
inline void turn(const T* from, int64_t row_stride, int64_t num_rows, int64_t size, Save save) {
    constexpr int STEP = Row<T>::STEP, PARTS = Row<T>::PARTS;
    for (int64_t k = 0; k < size; k += STEP) {
        f32x16 found[16][PARTS];
        bool is_whole = num_rows >= 16 && k + STEP <= size;
        for (int r = 0; r < 16 && !is_whole; ++r) {
            const T* row = from + r * row_stride + k;
            if (r >= num_rows)
                std::memset(found[r], 0, sizeof found[r]);
            else if (k + STEP <= size)
                Row<T>::factors(row, found[r]);
            else
                some_factors(row, size - k, found[r]);
        }
#pragma GCC unroll 2
        for (int i = 0; i < PARTS; ++i) {
            f32x16 rows[16];
#pragma GCC unroll 16
            for (int r = 0; r < 16; ++r) {
                f32x16 v[PARTS];
                if (is_whole) Row<T>::factors(from + r * row_stride + k, v);
                rows[r] = is_whole ? v[i] : found[r][i];
            }
            transpose(rows);
#pragma GCC unroll 16
            for (int n = 0; n < RUNS; ++n) save(n, k / STEP * PARTS + i, rows[RUN_AT[n]]);
        }
    }
}

// Rows of x, 16 at a time, as `turned_tile` wants them: panels of PANEL rows, [RUNS][num_factors][PANEL] each.
template <class T>
class Panels {
  public:
    Panels(int64_t num_rows, int64_t size)
        : size(size), num_factors(factors_size<T>(size) / 16), room(new Line[num_rows * RUNS * num_factors / 16]) {}

    // Rows 16 * i to 16 * i + 15.
    void take(int64_t i, const T* from, int64_t stride) {
        turn(from, stride, 16, size, [&](int run, int64_t f, f32x16 rows) __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (int p = 0; p < 16 / PANEL; ++p)
                std::memcpy(at(i * (16 / PANEL) + p) + (run * num_factors + f) * PANEL, (const float*)&rows + p * PANEL,
                            PANEL * sizeof(float));
        });
    }

    float* at(int64_t panel) const { return room.get()->floats + panel * RUNS * num_factors * PANEL; }

  private:
    int64_t size, num_factors;
    std::unique_ptr<Line[]> room;
};

// sums[b][c]: of each lane's row of block b with row c of the panel. Run n of a block begins at w + n * stride.
template <class T, int B>
[[gnu::noinline]] void turned_tile(const f32x16* w, int64_t stride, const float* x, int64_t num_factors,
                                   f32x16 (*sums)[PANEL]) {
    f32x16 kept[4][B][PANEL];
    for (int n = 0; n < RUNS; ++n, w += stride) {
        f32x16 s[B][PANEL] = {};
        for (int64_t f = 0; f < num_factors; ++f, x += PANEL) {
            f32x16 a[B];
#pragma GCC unroll 4
            for (int b = 0; b < B; ++b) a[b] = w[b * RUNS * stride + f];
#pragma GCC unroll 8
            for (int c = 0; c < PANEL; ++c) {
                f32x16 v = of_bits(x + c);
#pragma GCC unroll 4
                for (int b = 0; b < B; ++b) s[b][c] = Row<T>::multiply_add(s[b][c], a[b], v);
            }
        }
        int pairs = 0;
        for (; n >> pairs & 1; ++pairs)
#pragma GCC unroll 4
            for (int b = 0; b < B; ++b)
#pragma GCC unroll 8
                for (int c = 0; c < PANEL; ++c) s[b][c] += kept[pairs][b][c];
        f32x16(*to)[PANEL] = n + 1 < RUNS ? kept[pairs] : sums;
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b)
#pragma GCC unroll 8
            for (int c = 0; c < PANEL; ++c) to[b][c] = s[b][c];
    }
}

// The room of one thread for B blocks of weights that are turned.
template <class T>
class Turned {
  public:
    explicit Turned(int64_t size)
        : size(size),
          num_factors(factors_size<T>(size) / 16),
          stride(num_factors | 1),  // runs one after the other in a cache, not on top of each other
          room(new Line[BLOCKS * RUNS * stride]) {}

    // Rows w + r * w_stride times all rows of the panels: store(panel, sums), sums[b][c] as `turned_tile` has them.
    template <int B, class Store>
    void multiply(const T* w, int64_t w_stride, int64_t num_rows, const Panels<T>& x, int64_t num_panels, Store store) {
        f32x16* runs = (f32x16*)room.get();
        for (int b = 0; b < B; ++b)
            turn(w + b * TURNED * w_stride, w_stride, num_rows - b * TURNED, size,
                 [&](int run, int64_t f, f32x16 rows) __attribute__((always_inline)) {
                     runs[(b * RUNS + run) * stride + f] = rows;
                 });
        int64_t share = B * TURNED * w_stride * int64_t(sizeof(T)) / num_panels;
        const char* next = (const char*)(w + B * TURNED * w_stride);
        for (int64_t p = 0; p < num_panels; ++p, next += share) {
            for (int64_t i = 0; i < share; i += LINE) __builtin_prefetch(next + i, 0, 2);
            f32x16 sums[B][PANEL];
            turned_tile<T, B>(runs, stride, x.at(p), num_factors, sums);
            store(p, sums);
        }
    }

  private:
    int64_t size, num_factors, stride;
    std::unique_ptr<Line[]> room;
};
