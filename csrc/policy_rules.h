// The rules of the clip policies for the kernels of the CPU and of CUDA: how a list's norms move a policy's state, and
// what they decide. fastnorm/policy_rules.py has the same rules in PyTorch's operations. Free of torch and CUDA.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FASTNORM_RULE __device__ inline
#else
#define FASTNORM_RULE inline
#endif

namespace fastnorm::policy {

enum Rule : int { ZCLIP, AUTOCLIP, ADAGC, SPIKE_SKIP };

// Of the state's header. Behind it lies what belongs to the rule: AutoClip's ring of norms, AdaGC's γ of each tensor.
enum Field : int { COUNT, MEAN, VARIANCE, CONSECUTIVE, THRESHOLD, STEPS, CLIPPED, SKIPPED, HEADER };

constexpr int MAX_CONSTANTS = 6;

// The numbers that a rule has besides its state, of which the first is max_norm; 0 for a rule that doesn't exist.
constexpr int constants_of(int64_t rule) {
  constexpr int counts[] = {6, 3, 5, 6};
  return rule < ZCLIP || rule > SPIKE_SKIP ? 0 : counts[rule];
}

struct Policy {
  double* state;  // null: no policy, but a fixed number
  int64_t size;   // of the state, behind the header
  double constants[MAX_CONSTANTS];
  int rule;
};

// What a rule reads of the header, and changes.
struct Statistics {
  double count, mean, variance, consecutive;
};

FASTNORM_RULE bool is_finite(double x) { return x - x == 0; }

// Whether a total norm moves the statistics. Averages of zeros would scale all that follows to zero.
FASTNORM_RULE bool enters(double norm) { return is_finite(norm) && norm != 0; }

// min(ratio, 1); NaN stays NaN.
FASTNORM_RULE double bounded(double ratio) { return ratio > 1 ? 1 : ratio; }

// The threshold of ZClip. A spike enters the statistics as its threshold, or not at all; nor does what has no finite
// square, as an infinite variance would stay for ever.
FASTNORM_RULE double zclip(const double* constants, double norm, Statistics& s) {
  const double alpha = constants[1], z_threshold = constants[2], warmup = constants[3], eps = constants[4];
  const bool spikes_enter = constants[5] != 0;
  const double deviation = norm - s.mean;
  if (s.count < warmup) {
    if (norm * norm < INFINITY) {
      s.count += 1;
      s.mean += deviation / s.count;
      s.variance += (deviation * (norm - s.mean) - s.variance) / s.count;
    }
    return INFINITY;
  }
  const double std = std::sqrt(s.variance), z = deviation / (std + eps);
  const bool is_spike = z > z_threshold;
  const double threshold = is_spike ? s.mean + z_threshold * std / (z / z_threshold) : INFINITY;
  const double entering = is_spike ? threshold : norm;
  if ((!is_spike || spikes_enter) && entering * entering < INFINITY) {
    s.count += 1;
    s.mean = alpha * s.mean + (1 - alpha) * entering;
    s.variance = alpha * s.variance + (1 - alpha) * ((entering - s.mean) * (entering - s.mean));
  }
  return threshold;
}

// Whether SpikeSkip skips the step.
FASTNORM_RULE bool is_skipped(const double* constants, double norm, Statistics& s) {
  const double factor = constants[1], beta = constants[2], warmup = constants[3], max_consecutive = constants[4];
  const bool resumes = constants[5] != 0 && max_consecutive > 0 && s.consecutive >= max_consecutive;
  const bool is_warm = s.count >= warmup;
  if (is_warm && norm > factor * s.mean && !resumes) {
    return true;
  }
  s.count += 1;
  s.mean = is_warm ? beta * s.mean + (1 - beta) * norm : s.mean + (norm - s.mean) / s.count;
  return false;
}

// A team is one thread, or all threads of a block, which call these functions together:
//   total(), norm(i): the list's norm and tensor i's, as rounded for the caller
//   tensors(): how many there are
//   is_first(): of one of the threads, which writes what isn't written by `each`
//   sync(): what was written before is seen by all threads
//   any(flag): whether the flag of any thread is set; a sync() too
//   each(count, body): body(i) for every i of [0, count), shared out
//   norm_of(value): the p-norm of value(i) of all tensors
//   neighbours(values, count, rank, low, high): of the sorted values, those at `rank` and after it, or twice the last
//   write(i, coefficient): whether coefficient i, which it rounds and stores, is below 1
//   write_skip(skip)

// The threshold of AutoClip: a percentile of the last norms, interpolated as numpy.percentile does.
template <class Team>
FASTNORM_RULE double autoclip(const Policy& policy, Team& team, Statistics& s) {
  const double percentile = policy.constants[1], warmup = policy.constants[2];
  double* const ring = policy.state + HEADER;
  if (enters(team.total())) {
    if (team.is_first()) {
      ring[static_cast<int64_t>(s.count) % policy.size] = team.total();
    }
    s.count += 1;
    team.sync();
  }
  if (s.count == 0 || s.count <= warmup) {
    return INFINITY;
  }
  const int64_t filled = s.count < policy.size ? static_cast<int64_t>(s.count) : policy.size;
  const double place = percentile / 100 * (filled - 1);
  const int64_t rank = place < filled - 1 ? static_cast<int64_t>(place) : filled - 1;
  double low, high;
  team.neighbours(ring, filled, rank, low, high);
  const double share = place - rank;
  return share < 0.5 ? low + (high - low) * share : high - (high - low) * (1 - share);
}

// The coefficients of AdaGC, written, and the new γ: whether any of the former is below 1.
template <class Team>
FASTNORM_RULE bool adagc(const Policy& policy, Team& team, bool is_warm) {
  const double* const c = policy.constants;
  const double max_norm = c[0], lambda_abs = c[1], lambda_rel = c[2], beta = c[3], total = team.total();
  double* const averages = policy.state + HEADER;
  const double early = bounded(lambda_abs / (total + 1e-6));
  // Here and below all is computed and then selected: where norms are noise, branches are mispredicted, and without
  // them compilers take several tensors at a time.
  const auto factor = [=](double norm, double average) {
    const double ratio = bounded(lambda_rel * average / norm);  // 1 where there is no average yet, which is infinite
    const double own = norm == 0 ? 1 : ratio;
    return is_warm ? own : early;
  };
  const bool is_capped = max_norm < INFINITY;
  const double clipped_total =
      is_capped ? team.norm_of([&](int64_t i) { return factor(team.norm(i), averages[i]) * team.norm(i); }) : 0;
  const double cap = is_capped ? bounded(max_norm / (clipped_total + 1e-6)) : 1;
  const bool total_enters = enters(total);
  bool clips = false;
  team.each(team.tensors(), [&](int64_t i) {
    const double norm = team.norm(i), average = averages[i], own = factor(norm, average), clipped = own * norm;
    clips |= team.write(i, own * cap);
    const double early_average = clipped < average ? clipped : average;
    const double moved = beta * average + (1 - beta) * clipped;
    const double late_average = average == INFINITY ? norm : moved;
    const double entering = is_warm ? late_average : early_average;
    // A tensor whose first gradients are zero would be frozen for ever. Norms of a negative order may have a finite
    // total although one of them is infinite.
    const bool is_entered = total_enters & enters(norm);
    averages[i] = is_entered ? entering : average;
  });
  return clips;
}

// Writes the coefficients and whether to skip the step, and moves the state. A norm that is zero or not finite moves
// nothing but what is counted of the calls.
template <class Team>
FASTNORM_RULE void decide(const Policy& policy, Team& team) {
  double* const state = policy.state;
  const double* const constants = policy.constants;
  const double total = team.total(), max_norm = constants[0];
  Statistics s{state[COUNT], state[MEAN], state[VARIANCE], state[CONSECUTIVE]};
  double threshold = max_norm;
  bool is_spike = false, clips = false;
  switch (policy.rule) {
    case ZCLIP:
      threshold = zclip(constants, total, s);
      break;
    case AUTOCLIP:
      threshold = autoclip(policy, team, s);
      break;
    case ADAGC: {
      const bool is_warm = s.count >= constants[4];
      clips = adagc(policy, team, is_warm);
      threshold = is_warm ? max_norm : constants[1];
      s.count += 1;
      break;
    }
    default:
      is_spike = is_skipped(constants, total, s);
  }
  threshold = threshold > max_norm ? max_norm : threshold;
  if (policy.rule != ADAGC && team.is_first()) {
    clips = team.write(0, bounded(threshold / (total + 1e-6)));
  }
  clips = team.any(clips);  // by now, all threads have read the state
  if (!team.is_first()) {
    return;
  }
  const bool skips = is_spike || !is_finite(total);
  team.write_skip(skips);
  if (enters(total)) {
    state[COUNT] = s.count;
    state[MEAN] = s.mean;
    state[VARIANCE] = s.variance;
    state[CLIPPED] += clips;
  }
  state[CONSECUTIVE] = skips ? s.consecutive + 1 : 0;
  state[THRESHOLD] = threshold;
  state[STEPS] += 1;
  state[SKIPPED] += skips;
}

}  // namespace fastnorm::policy
