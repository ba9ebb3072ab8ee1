// A layer's experts: rows of x go to their experts in place, and only experts that have any are read.
#pragma once

#include <vector>

#include "pointwise.h"
#include "team.h"

struct ExpertsPart {
    Stack gate_up, down;  // a matrix for each slot
};

// Tokens with their experts, sorted by slot. A pair is token * top_k + choice.
struct Choices {
    std::vector<int64_t> starts, pairs;  // those of slot s are pairs[starts[s] : starts[s + 1]]
    std::vector<int64_t> at;             // by pair: where it is in `pairs`; -1: nowhere, its expert is not here

    Choices(const int64_t* slots, int64_t num_pairs, int64_t num_slots) : starts(num_slots + 1), at(num_pairs, -1) {
        for (int64_t p = 0; p < num_pairs; ++p)
            if (slots[p] >= 0) ++starts[slots[p] + 1];
        for (int64_t s = 0; s < num_slots; ++s) starts[s + 1] += starts[s];
        pairs.resize(starts[num_slots]);
        std::vector<int64_t> next(starts.begin(), starts.end() - 1);
        for (int64_t p = 0; p < num_pairs; ++p)
            if (slots[p] >= 0) {
                at[p] = next[slots[p]]++;
                pairs[at[p]] = p;
            }
    }
};

// In room that is given, some tokens at a time.
template <class T>
class Experts {
  public:
    Experts(const ExpertsPart& like, int64_t num_tokens, int64_t top_k, T* room)
        : hidden(like.down.first.out_size),
          inner(like.down.first.size),
          num_tokens(num_tokens),
          top_k(top_k),
          own(room),
          both(own + at_once(num_tokens, top_k) * top_k * hidden) {}

    static int64_t room(const ExpertsPart& like, int64_t num_tokens, int64_t top_k) {
        return at_once(num_tokens, top_k) * top_k * (like.down.first.out_size + 2 * like.down.first.size);
    }

    // Of a team. Slots and weights [tokens, top_k]; slot -1: not here. `out` may be x.
    void run(Team& team, const T* x, int64_t x_stride, const int64_t* slots, const float* weights,
             const ExpertsPart& part, T* out) const {
        int64_t step = at_once(num_tokens, top_k);
        for (int64_t t = 0; t < num_tokens; t += step)
            run_some(team, x + t * x_stride, x_stride, std::min(num_tokens - t, step), slots + t * top_k,
                     weights + t * top_k, part, out + t * hidden);
    }

  private:
    static constexpr int64_t PAIRS_AT_ONCE = 16384, FEW_PAIRS = 512, SHARES_ROWS = 1024;

    static int64_t at_once(int64_t num_tokens, int64_t top_k) {
        return std::min(num_tokens, std::max(PAIRS_AT_ONCE / top_k, int64_t(1)));
    }

    void run_some(Team& team, const T* x, int64_t x_stride, int64_t num_tokens, const int64_t* slots,
                  const float* weights, const ExpertsPart& part, T* out) const {
        auto make = [&] { return std::make_shared<Choices>(slots, num_tokens * top_k, part.down.count); };
        auto choices = num_tokens * top_k <= FEW_PAIRS ? make() : made_by_one(make);  // waiting takes longer than sorting
        int64_t num_pairs = choices->pairs.size();
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < num_pairs; ++i)
            std::memcpy(own + i * hidden, x + choices->pairs[i] / top_k * x_stride, hidden * sizeof(T));
        team.meet();
        multiply_each(team, own, hidden, *choices, part.gate_up, both);
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < num_pairs; ++i) {
            T* gate = both + i * 2 * inner;
            gate_row(gate, gate + inner, gate, inner);
        }
        team.meet();
        multiply_each(team, both, 2 * inner, *choices, part.down, own);
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < num_tokens; ++t)
            for (int64_t h = 0; h < hidden; h += 16) {
                f32x16 total{};
                for (int64_t p = t * top_k; p < (t + 1) * top_k; ++p)
                    if (slots[p] >= 0)
                        total += weights[p] * load_up_to_16(own + choices->at[p] * hidden + h, hidden - h);
                save_up_to_16(out + t * hidden + h, total, hidden - h);
            }
        team.meet();
    }

    // Few rows of several experts at once; the many of one by themselves.
    void multiply_each(Team& team, const T* x, int64_t x_stride, const Choices& choices, const Stack& weights, T* to) const {
        std::vector<Share> shares;
        auto multiply_shares = [&] {
            if (!shares.empty()) multiply(team, x, x_stride, shares.data(), shares.size(), to);
            shares.clear();
        };
        for (int64_t s = 0; s < weights.count; ++s) {
            Share share{weights[s], choices.starts[s], choices.starts[s + 1] - choices.starts[s]};
            if (share.count == 0) continue;
            bool is_large = share.count >= FEW_ROWS;
            if (is_large || (!shares.empty() && share.first - shares[0].first >= SHARES_ROWS)) multiply_shares();
            shares.push_back(share);
            if (is_large) multiply_shares();
        }
        multiply_shares();
    }

    int64_t hidden, inner, num_tokens, top_k;
    T *own, *both;  // rows of each pair: what its expert is given and what it gives; gates and what they are for
};
