// out = x w^T + bias, one thread to a piece of the weights' rows.
#include "tile.h"

namespace {

constexpr int64_t PIECE_BYTES = 128 << 10;  // of weights that a thread takes at a time
constexpr int64_t MOST_ROWS = 256;          // of x that are widened at once, if all of them stay in a cache
constexpr int64_t MANY_ROWS = 16;           // that are worth several threads for that

template <class T>
void linear(const T* x, int64_t x_stride, const T* w, int64_t w_stride, const T* bias, T* out, int64_t num_rows,
            int64_t out_size, int64_t size, int num_threads) {
    int64_t piece = PIECE_BYTES / (size * int64_t(sizeof(T)) + 1) / ROWS * ROWS;
    piece = piece < ROWS ? ROWS : piece;
    int64_t num_pieces = (out_size + piece - 1) / piece;
    int64_t at_once = CACHE_BYTES / (size * int64_t(sizeof(float)) + 1) / COLUMNS * COLUMNS;
    at_once = at_once < COLUMNS ? COLUMNS : at_once > MOST_ROWS ? MOST_ROWS : at_once;
    for (int64_t begin = 0; begin < num_rows; begin += at_once) {
        int64_t count = num_rows - begin < at_once ? num_rows - begin : at_once;
        Widened<T> wide(count, size);
#pragma omp parallel for num_threads(num_threads) if (count > MANY_ROWS)
        for (int64_t c = 0; c < count; ++c) wide.take(c, x + (begin + c) * x_stride);
        T* to = out + begin * out_size;
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (num_pieces > 1)
        for (int64_t p = 0; p < num_pieces; ++p) {
            int64_t first = p * piece, rows = out_size - first < piece ? out_size - first : piece;
            products<T>(w + first * w_stride, w_stride, rows, wide.rows.data(), count, size,
                        [&](auto n, int64_t r, int64_t c, int width, f32x16 v) __attribute__((always_inline)) {
                            constexpr int N = decltype(n)::value;
                            int64_t row = first + r;
                            if (bias) v += gather<T, N>(width, [&](int) { return bias + row; });
                            scatter<T, N>(v, width, [&](int j) { return to + (c + j) * out_size + row; });
                        });
        }
    }
}

}  // namespace

extern "C" {

void linear_f32(const float* x, int64_t x_stride, const float* w, int64_t w_stride, const float* bias, float* out,
                int64_t num_rows, int64_t out_size, int64_t size, int num_threads) {
    linear(x, x_stride, w, w_stride, bias, out, num_rows, out_size, size, num_threads);
}

void linear_bf16(const bf16* x, int64_t x_stride, const bf16* w, int64_t w_stride, const bf16* bias, bf16* out,
                 int64_t num_rows, int64_t out_size, int64_t size, int num_threads) {
    linear(x, x_stride, w, w_stride, bias, out, num_rows, out_size, size, num_threads);
}

}
