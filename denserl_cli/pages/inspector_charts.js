"use strict";
/* The charts of the inspector; colours are those of the style sheet, so they follow the scheme. */
const charts = (() => {
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function layout(extra) {
    const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--quiet"), automargin: true };
    return {
      paper_bgcolor: "transparent",
      plot_bgcolor: "transparent",
      font: { color: colour("--ink"), size: 12 },
      margin: { l: 50, r: 15, t: 10, b: 40 },
      hoverlabel: { bgcolor: colour("--panel"), font: { color: colour("--ink") } },
      ...extra,
      ...Object.fromEntries(
        Object.entries(extra).filter(([name]) => /^[xy]axis/.test(name)).map(([name, own]) => [name, { ...axis, ...own }]),
      ),
    };
  }

  function draw(element, traces, extra) {
    const quiet = { displayModeBar: false, responsive: true };
    return Plotly.react(element, traces, layout(extra), quiet);
  }

  /** Entropy with the cutoff, and below it the segments' rewards as bars as wide as they are.
   *  ranges: {entropy, reward}, the same for responses that stand beside each other. */
  function response(element, { trace, parts, cutoff, measure, title, ranges }) {
    const data = [];
    const shapes = [];
    const bars = measure && parts[0].value !== null;
    if (trace.entropy) {
      const inside = trace.sizes.length - 1; // there is no entropy after the last token
      const x = Array.from({ length: inside }, (_, j) => j + 1);
      const y = trace.entropy.slice(0, inside);
      const line = { color: colour("--quiet"), width: 1.2 };
      data.push({ x, y, mode: "lines", line, hovertemplate: "token %{x}: %{y:.3f} nats<extra></extra>" });
      const peaks = parts.filter((part) => part.peak);
      const marker = { symbol: "triangle-up", size: 6, color: colour("--accent") };
      data.push({ x: peaks.map((p) => p.end + 1), y: peaks.map((p) => p.entropy), mode: "markers", marker, hoverinfo: "skip" });
      if (cutoff !== null) {
        shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: cutoff, y1: cutoff, line: { color: colour("--bad"), width: 2, dash: "dash" } });
      }
    }
    if (bars) {
      const y = parts.map((part) => part[measure]);
      const colours = y.map((v) => colour(v < 0 ? "--warm" : "--cool"));
      data.push({
        type: "bar", yaxis: "y2", y, offset: 0,
        x: parts.map((part) => part.start + 0.5),
        width: parts.map((part) => part.end - part.start + 1),
        marker: {
          color: colours,
          pattern: { shape: y.map((v) => (v < 0 ? "/" : "")), size: 5, bgcolor: colours, fgcolor: y.map(() => colour("--page")) },
          line: { color: colour("--page"), width: 0.5 },
        },
        customdata: parts.map((part, k) => k + 1),
        hovertemplate: `segment %{customdata}: %{y:${measure === "perToken" ? ".3~r" : ".3f"}}<extra></extra>`,
      });
    }
    const both = trace.entropy && bars;
    draw(element, data, {
      height: both ? 320 : 200,
      showlegend: false,
      shapes,
      bargap: 0,
      xaxis: { title: { text: "token" }, anchor: bars ? "y2" : "y", range: [0.5, trace.sizes.length + 0.5], zeroline: false },
      yaxis: { title: { text: "entropy (nats)" }, domain: both ? [0.48, 1] : [0, 1], range: ranges.entropy, visible: !!trace.entropy },
      yaxis2: { title: { text: title }, domain: both ? [0, 0.42] : [0, 1], range: ranges.reward, visible: !!bars },
    });
  }

  /** Cumulative distribution, a line for each cutoff. */
  function cumulative(element, series, title) {
    const data = series.map(({ name, histogram, own }, k) => {
      const pairs = Object.entries(histogram).map(([value, count]) => [Number(value), count]);
      const total = pairs.reduce((sum, [, count]) => sum + count, 0);
      let so = 0;
      return {
        name, mode: "lines",
        x: pairs.map(([value]) => value),
        y: pairs.map(([, count]) => (so += count) / total),
        line: { shape: "hv", dash: DASHES[k % DASHES.length], width: own ? 3.5 : 1.5 },
      };
    });
    const ticks = { tickformat: ".0%", range: [0, 1.02], title: { text: "share" } };
    draw(element, data, {
      height: 340,
      legend: { title: { text: "cutoff" } },
      xaxis: { title: { text: title }, type: "log" },
      yaxis: ticks,
    });
  }

  return { response, cumulative };
})();
