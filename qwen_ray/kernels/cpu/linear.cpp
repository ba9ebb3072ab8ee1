// out = x w^T + bias, one thread to a piece of the weights' rows.
#include "team.h"
#include "tile.h"

namespace {

constexpr int64_t PIECE_BYTES = 128 << 10;  // of weights that a thread takes at a time
constexpr int64_t MOST_ROWS = 256;          // of x that are made ready at once

template <class T>
void multiply_plain(Team& team, const T* x, int64_t x_stride, const Matrix& w, T* out, int64_t num_rows) {
    const T *values = (const T*)w.values, *bias = (const T*)w.bias;
    int64_t size = w.size, out_size = w.out_size, w_stride = w.row_bytes / int64_t(sizeof(T));
    int64_t piece = PIECE_BYTES / (size * int64_t(sizeof(T)) + 1) / ROWS * ROWS;
    piece = piece < ROWS ? ROWS : piece;
    int64_t num_pieces = (out_size + piece - 1) / piece;
    for (int64_t begin = 0; begin < num_rows; begin += MOST_ROWS) {
        int64_t count = num_rows - begin < MOST_ROWS ? num_rows - begin : MOST_ROWS;
        auto take = [&](Factors<T>& to, int64_t c) { to.take(c, x + (begin + c) * x_stride); };
        auto ready = made_ready<Factors<T>>(team, count, take, size);
        T* to = out + begin * out_size;
#pragma omp for schedule(dynamic) nowait
        for (int64_t p = 0; p < num_pieces; ++p) {
            int64_t first = p * piece, rows = out_size - first < piece ? out_size - first : piece;
            products<T>(values + first * w_stride, w_stride, rows, ready->rows.data(), count, size,
                        [&](auto n, int64_t r, int64_t c, int width, f32x16 v) __attribute__((always_inline)) {
                            constexpr int N = decltype(n)::value;
                            int64_t row = first + r;
                            if (bias) v += gather<T, N>(width, [&](int) { return bias + row; });
                            scatter<T, N>(v, width, [&](int j) { return to + (c + j) * out_size + row; });
                        });
        }
    }
    team.meet();
}

}  // namespace

template <class T>
void multiply(Team& team, const T* x, int64_t x_stride, const Matrix& w, T* out, int64_t num_rows) {
    if (w.bits == 8) return multiply_eight_bits(team, x, x_stride, w, out, num_rows);
    if (w.bits == 4) return multiply_four_bits(team, x, x_stride, w, out, num_rows);
    multiply_plain(team, x, x_stride, w, out, num_rows);
}

#define EXPORT(T, SUFFIX)                                                                                              \
    template void multiply<T>(Team&, const T*, int64_t, const Matrix&, T*, int64_t);                                   \
    extern "C" void linear_##SUFFIX(const T* x, int64_t x_stride, const Matrix* w, T* out, int64_t num_rows,           \
                                    int num_threads) {                                                                 \
        Team team;                                                                                                     \
        _Pragma("omp parallel num_threads(num_threads) if (w->num_bytes() > WORTH_A_TEAM)")                            \
        multiply(team, x, x_stride, *w, out, num_rows);                                                                \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
