// out = x w^T + bias, one thread to a piece of the weights' rows.
#include "team.h"
#include "turned.h"

namespace {

constexpr int64_t PIECE_BYTES = 32 << 10;  // of weights: what a thread takes at least, large pieces first
constexpr int64_t MOST_ROWS = 512;         // of x that are made ready at once
constexpr int64_t MANY = 128;              // rows of x for whom weights are worth turning

struct Pieces {  // of weights' rows, `each` a multiple of what is multiplied at once
    int64_t each, count;

    Pieces(const Matrix& w, int64_t at_once) {
        each = std::max(PIECE_BYTES / (w.row_bytes + 1) / at_once * at_once, at_once);  // no bytes: more ranks than columns
        count = (w.out_size + each - 1) / each;
    }
};

template <class T>
void multiply_few(Team& team, const T* x, int64_t x_stride, const Matrix& w, T* out, int64_t num_rows) {
    const T *values = (const T*)w.values, *bias = (const T*)w.bias;
    int64_t w_stride = w.row_bytes / int64_t(sizeof(T)), out_size = w.out_size;
    Pieces pieces(w, ROWS);
    for (int64_t begin = 0; begin < num_rows; begin += MOST_ROWS) {
        int64_t count = std::min(num_rows - begin, MOST_ROWS);
        auto take = [&](Factors<T>& to, int64_t c) { to.take(c, x + (begin + c) * x_stride); };
        auto ready = made_ready<Factors<T>>(team, count, take, w.size);
        T* to = out + begin * out_size;
#pragma omp for schedule(guided) nowait
        for (int64_t p = 0; p < pieces.count; ++p) {
            int64_t first = p * pieces.each, rows = std::min(out_size - first, pieces.each);
            products<T>(values + first * w_stride, w_stride, rows, ready->rows.data(), count, w.size,
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

// The same for many rows, whole sixteens of them.
template <class T>
void multiply_many(Team& team, const T* x, int64_t x_stride, const Matrix& w, T* out, int64_t num_rows) {
    const T *values = (const T*)w.values, *bias = (const T*)w.bias;
    int64_t w_stride = w.row_bytes / int64_t(sizeof(T)), out_size = w.out_size;
    Pieces pieces(w, BLOCKS * TURNED);
    for (int64_t begin = 0; begin < num_rows; begin += MOST_ROWS) {
        int64_t count = std::min(num_rows - begin, MOST_ROWS);
        auto ready = made_by_one([&] { return std::make_shared<Panels<T>>(count, w.size); });
#pragma omp for nowait
        for (int64_t i = 0; i < count / 16; ++i) ready->take(i, x + (begin + i * 16) * x_stride, x_stride);
        team.meet();
        Turned<T> turned(w.size);
        auto run = [&](auto blocks, int64_t row) __attribute__((always_inline)) {
            constexpr int B = decltype(blocks)::value;
            auto store = [&](int64_t panel, const f32x16 (*sums)[PANEL]) {
                for (int b = 0; b < B; ++b) {
                    int64_t at = row + b * TURNED, rows = out_size - at;
                    f32x16 add = bias ? load_up_to_16(bias + at, rows) : f32x16{};
                    for (int c = 0; c < PANEL; ++c) {
                        f32x16 v = bias ? sums[b][c] + add : sums[b][c];
                        save_up_to_16(out + (begin + panel * PANEL + c) * out_size + at, v, rows);
                    }
                }
            };
            turned.template multiply<B>(values + row * w_stride, w_stride, out_size - row, *ready, count / PANEL, store);
        };
#pragma omp for schedule(guided) nowait
        for (int64_t p = 0; p < pieces.count; ++p) {
            int64_t row = p * pieces.each, end = std::min(row + pieces.each, out_size);
            for (; BLOCKS > 1 && end - row > (BLOCKS - 1) * TURNED; row += BLOCKS * TURNED)
                run(std::integral_constant<int, BLOCKS>{}, row);
            for (; row < end; row += TURNED) run(std::integral_constant<int, 1>{}, row);
        }
    }
    team.meet();
}

template <class T>
void multiply_plain(Team& team, const T* x, int64_t x_stride, const Matrix& w, T* out, int64_t num_rows) {
    int64_t many = num_rows < MANY || w.size == 0 ? 0 : num_rows / 16 * 16;
    if (many) multiply_many(team, x, x_stride, w, out, many);
    if (many < num_rows) multiply_few(team, x + many * x_stride, x_stride, w, out + many * w.out_size, num_rows - many);
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
