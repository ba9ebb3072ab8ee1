// A small block of a matrix product, kept in registers: a few rows of weights times a few rows of activations.
//
// Weights lie as torch has them, rows of elements one after the other: nothing is packed, and the weights that are
// multiplied are the ones that are moved, looked up and counted elsewhere. Rows of activations are factors already
// (`factor_row`), once for all weights. Knows nothing of threads.
#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "vectors.h"

#if defined(__AVX512F__)
constexpr int ROWS = 4, COLUMNS = 4;  // of 32 registers 16 hold sums
#else
constexpr int ROWS = 2, COLUMNS = 2;
#endif
constexpr int64_t ROW_PART = 2048;          // of a row, that is multiplied before its next part
constexpr int64_t LINE = 64;                // bytes, of a cache: a step's
constexpr int64_t CACHE_BYTES = 512 << 10;  // of activations that stay in a core's own cache while weights pass by

// What a tile asks for while it multiplies: `first` bytes behind its rows, and `apart` more at each step.
struct Next {
    int64_t first, apart;
};

// Elements `from` to `size` of the rows. Lane c * R + r of the result: row w[r] times row x[c]. `kept` [R * C] has the
// sums over what is before, and gets those that `is_last` does not add up yet.
template <class T, int R, int C>
[[gnu::noinline]] f32x16 tile(const T* const* w, const float* const* x, int64_t from, int64_t size, bool is_last,
                              f32x16* kept, Next next) {
    constexpr int STEP = Row<T>::STEP, PARTS = Row<T>::PARTS;
    f32x16 sums[R * C] = {};
    if (from) {
#pragma GCC unroll 16
        for (int i = 0; i < R * C; ++i) sums[i] = kept[i];
    }
    const T* wr[R];
    const float* xc[C];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) wr[r] = w[r];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) xc[c] = x[c] + factors_size<T>(from);
    if constexpr (C == 1) {
        // Nothing but weights to wait for: row after row, as they lie in memory.
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const float* at = xc[0];
            int64_t k = from;
            f32x16 a[PARTS];
            auto step = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 2
                for (int i = 0; i < PARTS; ++i, at += 16) sums[r] = Row<T>::multiply_add(sums[r], a[i], load<f32x16>(at));
            };
            for (; k + STEP <= size; k += STEP) {
                Row<T>::factors(wr[r] + k, a);
                ask_ahead(wr[r] + k);
                step();
            }
            if (k < size) {
                some_factors(wr[r] + k, size - k, a);
                step();
            }
        }
    } else {
        f32x16 a[R][PARTS];
        auto step = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 2
            for (int i = 0; i < PARTS; ++i)
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c) {
                    f32x16 b = load<f32x16>(xc[c]);
                    xc[c] += 16;
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r) sums[c * R + r] = Row<T>::multiply_add(sums[c * R + r], a[r][i], b);
                }
        };
        int64_t k = from;
        for (; k + STEP <= size; k += STEP) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                Row<T>::factors(wr[r] + k, a[r]);
                __builtin_prefetch((const char*)(wr[r] + from) + next.first);
            }
            next.first += next.apart;
            step();
        }
        if (k < size) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) some_factors(wr[r] + k, size - k, a[r]);
            step();
        }
    }
    if (is_last) return add_lanes<R * C>(sums);
#pragma GCC unroll 16
    for (int i = 0; i < R * C; ++i) kept[i] = sums[i];
    return f32x16{};
}

template <class T, int R, class... Arguments>
inline f32x16 tile_of(int num_columns, Arguments... arguments) {
    if constexpr (COLUMNS == 4) {
        if (num_columns == 4) return tile<T, R, 4>(arguments...);
        if (num_columns == 3) return tile<T, R, 3>(arguments...);
    }
    return num_columns == 2 ? tile<T, R, 2>(arguments...) : tile<T, R, 1>(arguments...);
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
    int64_t part = num_columns > COLUMNS ? ROW_PART : size + 1;  // few columns: no row is read twice; size may be 0
    int64_t at_once = CACHE_BYTES / (factors_size<T>(std::min(part, size)) * int64_t(sizeof(float)) + 1);
    at_once = at_once < COLUMNS ? COLUMNS : at_once / COLUMNS * COLUMNS;
    std::unique_ptr<f32x16[]> kept(part < size ? new f32x16[(num_rows + ROWS) * at_once] : nullptr);
    for (int64_t from = 0; from < num_columns; from += at_once) {
        int64_t to = from + at_once < num_columns ? from + at_once : num_columns;
        int64_t num_tiles = (to - from + COLUMNS - 1) / COLUMNS;
        for (int64_t k = 0; k == 0 || k < size; k += part) {
            bool is_last = k + part >= size;
            int64_t end = is_last ? size : k + part;
            auto rows = [&](auto n, int64_t r) __attribute__((always_inline)) {
                constexpr int N = decltype(n)::value;
                const T* own[N];
                for (int i = 0; i < N; ++i) own[i] = w + (r + i) * stride;
                // Each tile asks for its share of the next rows: all at once are more than a core can wait for.
                int64_t apart = from == 0 ? LINE / num_tiles : 0, share = (end - k) * int64_t(sizeof(T)) / num_tiles;
                Next next{from == 0 ? ROWS * stride * int64_t(sizeof(T)) : 0, apart};
                for (int64_t c = from; c < to; c += COLUMNS) {
                    int width = to - c < COLUMNS ? to - c : COLUMNS;
                    f32x16* sums = kept.get() + r * at_once + (c - from) * N;
                    f32x16 v = tile_of<T, N>(width, own, x + c, k, end, is_last, sums, next);
                    if (is_last) store(n, r, c, width, v);
                    if (apart) next.first += share;
                }
            };
            int64_t r = 0;
            for (; r + ROWS <= num_rows; r += ROWS) rows(std::integral_constant<int, ROWS>{}, r);
            for (; r < num_rows; ++r) rows(std::integral_constant<int, 1>{}, r);
        }
    }
}

// Rows of activations as `tile` wants them: where they are, if they are factors as they lie there and end with a step.
template <class T>
class Factors {
  public:
    Factors(int64_t num_rows, int64_t size) : rows(num_rows), size(size), stride(factors_size<T>(size)) {
        if (Row<T>::PARTS > 1 || size % Row<T>::STEP) room.reset(new Line[(num_rows * stride + 15) / 16]);
    }

    void take(int64_t row, const T* from) {
        if (room) {
            float* to = room.get()->floats + row * stride;
            factor_row(from, size, to);
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
