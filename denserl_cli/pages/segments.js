"use strict";
/* What core/segmentation.py, core/ppo/rewards.py and core/inspection compute, for a page: no DOM here. */
const denserl = (() => {
  const SPACES = /[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/g;

  /** Tokens that end a segment (method §2) where the entropy, in nats after each of `count` response
   *  tokens, is above the cutoff. */
  function segmentEnds(entropy, count, terminated, cutoff) {
    const closing = terminated && count > 1 ? count - 2 : count - 1; // a lone token is a segment
    const ends = [];
    for (let j = 0; j < closing; j++) if (entropy[j] > cutoff) ends.push(j);
    ends.push(closing);
    return ends;
  }

  /** The segment ends of a response; without a cutoff those in the data. */
  function endsOf(trace, cutoff) {
    if (cutoff === null) return trace.ends;
    return segmentEnds(trace.entropy, trace.sizes.length, trace.terminated, cutoff);
  }

  /** The reward normalised by its location p (method §4). */
  function normalized(value, normalizer, p) {
    const mean = normalizer.w_mean * Math.log(p) + normalizer.b_mean;
    const std = normalizer.w_std * Math.log(p) + normalizer.b_std;
    return (value - mean) / Math.max(std, normalizer.min_std);
  }

  /** The factor of each segment's reward in the response's total (`ppo.segment_total`). */
  function shares(rewards, spread) {
    if (spread.segment_total === "sum") return rewards.map(() => 1);
    if (spread.segment_total === "mean") return rewards.map(() => 1 / rewards.length);
    const least = Math.min(...rewards); // softmin
    const weights = rewards.map((r) => Math.exp((least - r) / spread.softmin_temperature));
    const sum = weights.reduce((total, weight) => total + weight, 0);
    return weights.map((weight) => weight / sum);
  }

  /** The reward that PPO gives the segment's last token, before KL and penalties (method §5). */
  function perToken(reward, length, tokens, spread) {
    let given = reward;
    if (spread.interpolation === "even") given /= length;
    given *= spread.weight;
    if (spread.length_normalize) given /= tokens;
    return Math.min(Math.max(given, -spread.clip), spread.clip);
  }

  /** A response in segments: {start, end, peak, entropy, value, reward, perToken}; null: absent. */
  function segments(trace, view, cutoff) {
    const count = trace.sizes.length;
    const ends = endsOf(trace, cutoff);
    const raw = ends.map((end) => (trace.values ? trace.values[end] : null));
    const rewards = raw.map((value, k) =>
      value !== null && view.normalizer
        ? normalized(value, view.normalizer, (k + 1) / ends.length)
        : null,
    );
    const paid = trace.values && view.ready ? raw.map((value, k) => rewards[k] ?? value) : [];
    const share = shares(paid, view.spread);
    return ends.map((end, k) => {
      const start = k ? ends[k - 1] + 1 : 0;
      const entropy = trace.entropy && end < count - 1 ? trace.entropy[end] : null;
      const value = raw[k];
      const reward = rewards[k];
      const given = paid.length
        ? perToken(share[k] * paid[k], end - start + 1, count, view.spread)
        : null;
      const peak = view.at_peaks && k < ends.length - 1;
      return { start, end, peak, entropy, value, reward, perToken: given };
    });
  }

  /** The response's score: its segments' raw rewards aggregated; null without a reward model. */
  function score(parts, how) {
    if (!parts.length || parts[0].value === null) return null;
    if (how === "last") return parts.at(-1).value;
    const sum = parts.reduce((total, part) => total + part.value, 0);
    return how === "mean" ? sum / parts.length : sum;
  }

  /** The offset of each token in the text, and the end of the text. */
  function starts(trace) {
    if (!trace.starts) {
      trace.starts = [0];
      for (const size of trace.sizes) trace.starts.push(trace.starts.at(-1) + size);
    }
    return trace.starts;
  }

  /** Where segments end in the text: characters before, spaces (as Python has them) not counted. */
  function places(trace, ends) {
    if (!trace.solid) {
      const from = starts(trace);
      trace.solid = [0];
      for (let j = 0; j < trace.sizes.length; j++) {
        const text = trace.text.slice(from[j], from[j + 1]).replace(SPACES, "");
        trace.solid.push(trace.solid[j] + text.length);
      }
    }
    return ends.map((end) => trace.solid[end + 1]);
  }

  /** Boundaries inside a response of two cuts, and those that both have: [first, second, shared]. */
  function agreement(first, second) {
    const last = Math.min(first.at(-1), second.at(-1));
    const [a, b] = [first, second].map(
      (found) => new Set(found.filter((place) => place > 0 && place < last)),
    );
    return [a.size, b.size, [...a].filter((place) => b.has(place)).length];
  }

  return { segmentEnds, endsOf, segments, score, starts, places, agreement };
})();
