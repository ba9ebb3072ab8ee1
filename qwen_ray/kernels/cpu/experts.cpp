// A layer's experts: rows of x go to their experts in place, only experts that have any are read.
#include <vector>

#include "tile.h"

namespace {

constexpr int64_t PIECE_BYTES = 64 << 10;  // of one matrix's rows that a thread takes at a time
constexpr int64_t MANY = 1 << 18;          // multiplications with gates that are worth several threads

struct Piece {
    int64_t slot, first, count;  // of the rows of an expert's matrix
};

struct Choices {  // sorted by slot: those of slot s are pairs[starts[s] : starts[s + 1]], a pair being token * k + choice
    std::vector<int64_t> starts, pairs;

    Choices(const int64_t* slots, int64_t num_pairs, int64_t num_slots) : starts(num_slots + 1) {
        for (int64_t p = 0; p < num_pairs; ++p)
            if (slots[p] >= 0) ++starts[slots[p] + 1];
        for (int64_t s = 0; s < num_slots; ++s) starts[s + 1] += starts[s];
        pairs.resize(starts[num_slots]);
        std::vector<int64_t> next(starts.begin(), starts.end() - 1);
        for (int64_t p = 0; p < num_pairs; ++p)
            if (slots[p] >= 0) pairs[next[slots[p]]++] = p;
    }

    std::vector<Piece> pieces(int64_t num_rows, int64_t row_bytes) const {
        int64_t most = PIECE_BYTES / row_bytes / 16 * 16;
        most = most < 16 ? 16 : most;
        std::vector<Piece> found;
        for (int64_t s = 0; s + 1 < int64_t(starts.size()); ++s)
            for (int64_t r = 0; starts[s + 1] > starts[s] && r < num_rows; r += most)
                found.push_back({s, r, num_rows - r < most ? num_rows - r : most});
        return found;
    }
};

template <class T>
void run_experts(const T* x, int64_t x_stride, int64_t num_tokens, const int64_t* slots, int64_t top_k,
                 const float* weights, const T* gate_up, const T* down, int64_t num_slots, int64_t inner,
                 int64_t hidden, T* middle, T* parts, T* out, int num_threads) {
    Choices choices(slots, num_tokens * top_k, num_slots);
    int64_t num_pairs = choices.pairs.size();
    Factors<T> tokens(num_tokens, hidden), middles(num_pairs, inner);
    std::vector<const float*> rows(num_pairs);
    std::vector<Piece> ups = choices.pieces(inner, 2 * hidden * sizeof(T)), 
                       downs = choices.pieces(hidden, inner * sizeof(T));
    int64_t num_ups = ups.size(), num_downs = downs.size();
    // Rows of an expert's matrix times what goes to it; gated: times what silu makes of that which stands there.
    auto each = [&](const T* w, const Piece& piece, const std::vector<const float*>& columns, int64_t size, T* to,
                    int64_t to_stride, bool is_gated) __attribute__((always_inline)) {
        int64_t start = choices.starts[piece.slot], count = choices.starts[piece.slot + 1] - start;
        products<T>(w + piece.first * size, size, piece.count, columns.data() + start, count, size,
                    [&](auto n, int64_t r, int64_t c, int width, f32x16 v) __attribute__((always_inline)) {
                        constexpr int N = decltype(n)::value;
                        auto at = [&](int j) { return to + choices.pairs[start + c + j] * to_stride + piece.first + r; };
                        if (is_gated) v = rounded<T>(silu(gather<T, N>(width, at))) * rounded<T>(v);
                        scatter<T, N>(v, width, at);
                    });
    };
#pragma omp parallel num_threads(num_threads) if (num_pairs * inner * hidden > MANY)
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < num_tokens; ++t) tokens.take(t, x + t * x_stride);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < num_pairs; ++i) rows[i] = tokens.rows[choices.pairs[i] / top_k];
#pragma omp for schedule(guided)
        for (int64_t p = 0; p < num_ups; ++p) {
            const T* gate = gate_up + ups[p].slot * 2 * inner * hidden;
            each(gate, ups[p], rows, hidden, middle, inner, false);
            each(gate + inner * hidden, ups[p], rows, hidden, middle, inner, true);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < num_pairs; ++i) middles.take(i, middle + choices.pairs[i] * inner);
#pragma omp for schedule(guided)
        for (int64_t p = 0; p < num_downs; ++p)
            each(down + downs[p].slot * hidden * inner, downs[p], middles.rows, inner, parts, hidden, false);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < num_tokens; ++t)
            for (int64_t h = 0; h < hidden; h += 16) {
                f32x16 total{};
                for (int64_t c = t * top_k; c < (t + 1) * top_k; ++c)
                    if (slots[c] >= 0) total += weights[c] * load_up_to_16(parts + c * hidden + h, hidden - h);
                save_up_to_16(out + t * hidden + h, total, hidden - h);
            }
    }
}

}  // namespace

#define EXPORT(T, SUFFIX)                                                                                              \
    extern "C" void run_experts_##SUFFIX(const T* x, int64_t x_stride, int64_t num_tokens, const int64_t* slots,       \
                                         int64_t top_k, const float* weights, const T* gate_up, const T* down,         \
                                         int64_t num_slots, int64_t inner, int64_t hidden, T* middle, T* parts,        \
                                         T* out, int num_threads) {                                                    \
        run_experts(x, x_stride, num_tokens, slots, top_k, weights, gate_up, down, num_slots, inner, hidden, middle,   \
                    parts, out, num_threads);                                                                          \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
