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
void multiply_few(Team& team, const T* x, int64_t x_stride, const Share* shares, int64_t num_shares, T* out) {
    const Matrix& like = shares->w;
    int64_t w_stride = like.row_bytes / int64_t(sizeof(T)), out_size = like.out_size;
    Pieces pieces(like, ROWS);
    in_parts(shares, num_shares, MOST_ROWS, [&](const Share* shares, int64_t num_shares) {
        int64_t base = shares->first, num_rows = shares[num_shares - 1].first + shares[num_shares - 1].count - base;
        auto take = [&](Factors<T>& to, int64_t s, int64_t c) {
            int64_t row = shares[s].first + c;
            to.take(row - base, x + row * x_stride);
        };
        auto ready = made_ready<Factors<T>>(team, shares, num_shares, take, num_rows, like.size);
#pragma omp for schedule(guided) nowait
        for (int64_t p = 0; p < num_shares * pieces.count; ++p) {
            const Share& share = shares[p / pieces.count];
            const T *values = (const T*)share.w.values, *bias = (const T*)share.w.bias;
            T* to = out + share.first * out_size;
            int64_t first = p % pieces.count * pieces.each, rows = std::min(out_size - first, pieces.each);
            products<T>(values + first * w_stride, w_stride, rows, ready->rows.data() + share.first - base, share.count,
                        like.size, [&](auto n, int64_t r, int64_t c, int width, f32x16 v) __attribute__((always_inline)) {
                            constexpr int N = decltype(n)::value;
                            int64_t row = first + r;
                            if (bias) v += gather<T, N>(width, [&](int) { return bias + row; });
                            scatter<T, N>(v, width, [&](int j) { return to + (c + j) * out_size + row; });
                        });
        }
    });
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
void multiply_plain(Team& team, const T* x, int64_t x_stride, const Share* shares, int64_t num_shares, T* out) {
    Share rest = *shares;
    if (num_shares > 1 || rest.count < MANY || rest.w.size == 0)
        return multiply_few(team, x, x_stride, shares, num_shares, out);
    int64_t many = rest.count / 16 * 16;
    multiply_many(team, x + rest.first * x_stride, x_stride, rest.w, out + rest.first * rest.w.out_size, many);
    rest.first += many;
    rest.count -= many;
    if (rest.count) multiply_few(team, x, x_stride, &rest, 1, out);
}

}  // namespace

template <class T>
void multiply(Team& team, const T* x, int64_t x_stride, const Share* shares, int64_t num_shares, T* out) {
    if (shares->w.bits == 8) return multiply_eight_bits(team, x, x_stride, shares, num_shares, out);
    if (shares->w.bits == 4) return multiply_four_bits(team, x, x_stride, shares, num_shares, out);
    multiply_plain(team, x, x_stride, shares, num_shares, out);
}

#define EXPORT(T, SUFFIX)                                                                                              \
    template void multiply<T>(Team&, const T*, int64_t, const Share*, int64_t, T*);                                    \
    extern "C" void linear_##SUFFIX(const T* x, int64_t x_stride, const Matrix* w, T* out, int64_t num_rows,           \
                                    int num_threads) {                                                                 \
        Team team;                                                                                                     \
        _Pragma("omp parallel num_threads(num_threads) if (w->num_bytes() > WORTH_A_TEAM)")                            \
        multiply(team, x, x_stride, *w, out, num_rows);                                                                \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
