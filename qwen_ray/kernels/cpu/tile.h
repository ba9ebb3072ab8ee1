// A small block of a matrix product, kept in registers: a few rows of weights times a few rows of activations.
//
// Weights lie as torch has them, rows of elements one after the other: nothing is packed, and the weights that are
// multiplied are the ones that are moved, looked up and counted elsewhere. Rows of activations have been widened
// (`widen_row`), once for all weights. Knows nothing of threads.
#pragma once

#include <memory>
#include <type_traits>
#include <vector>

#include "vectors.h"

#if defined(__AVX512F__)
constexpr int ROWS = 4, COLUMNS = 4;  // of 32 registers 16 hold sums
#else
constexpr int ROWS = 2, COLUMNS = 2;
#endif
constexpr int64_t CACHE_BYTES = 768 << 10;  // of activations that stay in a core's own cache while weights pass by

// Lane c * R + r of the result: row w[r] times row x[c]. `ahead` bytes on lies what will be asked for next.
template <class T, int R, int C>
[[gnu::noinline]] f32x16 tile(const T* const* w, const float* const* x, int64_t size, int64_t ahead) {
    constexpr int STEP = Row<T>::STEP, PARTS = Row<T>::PARTS;
    f32x16 sums[R * C] = {};
    const T* wr[R];
    const float* xc[C];
    for (int r = 0; r < R; ++r) wr[r] = w[r];
    for (int c = 0; c < C; ++c) xc[c] = x[c];
    auto step = [&](const f32x16 (&a)[R][PARTS], int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int i = 0; i < PARTS; ++i)
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) {
                f32x16 b = load<f32x16>(xc[c] + k + 16 * i);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) sums[c * R + r] += a[r][i] * b;
            }
    };
    f32x16 a[R][PARTS];
    int64_t k = 0;
    for (; k + STEP <= size; k += STEP) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            Row<T>::widen(wr[r] + k, a[r]);
            __builtin_prefetch((const char*)(wr[r] + k) + ahead);
        }
        step(a, k);
    }
    if (k < size) {
        for (int r = 0; r < R; ++r) {
            T room[STEP] = {};
            std::memcpy(room, wr[r] + k, (size - k) * sizeof(T));
            Row<T>::widen(room, a[r]);
        }
        step(a, k);
    }
    return add_lanes<R * C>(sums);
}

template <class T, int R>
inline f32x16 tile_of(int num_columns, const T* const* w, const float* const* x, int64_t size, int64_t ahead) {
    if constexpr (COLUMNS == 4) {
        if (num_columns == 4) return tile<T, R, 4>(w, x, size, ahead);
        if (num_columns == 3) return tile<T, R, 3>(w, x, size, ahead);
    }
    return num_columns == 2 ? tile<T, R, 2>(w, x, size, ahead) : tile<T, R, 1>(w, x, size, ahead);
}

// What belongs to a tile of N rows and `width` columns, in the order of its lanes: N elements at each at(column).
template <class T, int N, class At>
inline f32x16 gather(int width, At at) {
    T room[16] = {};
    for (int c = 0; c < width; ++c) std::memcpy(room + c * N, at(c), N * sizeof(T));
    return Row<T>::load16(room);
}

template <class T, int N, class At>
inline void scatter(f32x16 v, int width, At at) {
    T room[16];
    Row<T>::save16(room, v);
    for (int c = 0; c < width; ++c) std::memcpy(at(c), room + c * N, N * sizeof(T));
}

// Every one of `num_rows` rows w + r * stride times every one of the rows x[c], tile by tile:
// store(number of rows as a type, first row, first column, number of columns, lanes).
template <class T, class Store>
inline void products(const T* w, int64_t stride, int64_t num_rows, const float* const* x, int64_t num_columns,
                     int64_t size, Store store) {
    int64_t at_once = CACHE_BYTES / (size * int64_t(sizeof(float)) + 1);
    at_once = at_once < COLUMNS ? COLUMNS : at_once / COLUMNS * COLUMNS;
    int64_t ahead = ROWS * stride * int64_t(sizeof(T));
    for (int64_t from = 0; from < num_columns; from += at_once) {
        int64_t to = from + at_once < num_columns ? from + at_once : num_columns;
        auto rows = [&](auto n, int64_t r) __attribute__((always_inline)) {
            constexpr int N = decltype(n)::value;
            const T* own[N];
            for (int i = 0; i < N; ++i) own[i] = w + (r + i) * stride;
            for (int64_t c = from; c < to; c += COLUMNS) {
                int width = to - c < COLUMNS ? to - c : COLUMNS;
                store(n, r, c, width, tile_of<T, N>(width, own, x + c, size, c == from ? ahead : 0));
            }
        };
        int64_t r = 0;
        for (; r + ROWS <= num_rows; r += ROWS) rows(std::integral_constant<int, ROWS>{}, r);
        for (; r < num_rows; ++r) rows(std::integral_constant<int, 1>{}, r);
    }
}

// Rows of activations as `tile` wants them; float32 stays where it is, unless its rows end within a step.
template <class T>
class Widened {
  public:
    Widened(int64_t num_rows, int64_t size)
        : rows(num_rows), size(size), stride((size + Row<T>::STEP - 1) / Row<T>::STEP * Row<T>::STEP) {
        if (Row<T>::PARTS > 1 || stride > size) room.reset(new Line[(num_rows * stride + 15) / 16]);
    }

    void take(int64_t row, const T* from) {
        if (room) {
            float* to = room.get()->floats + row * stride;
            widen_row(from, size, to);
            rows[row] = to;
        } else {
            rows[row] = (const float*)from;
        }
    }

    std::vector<const float*> rows;

  private:
    int64_t size, stride;
    std::unique_ptr<Line[]> room;
};
