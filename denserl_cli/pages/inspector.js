"use strict";
(() => {
  const { views, traces, examples, statistics } = JSON.parse(document.getElementById("data").textContent);
  const WINDOW = 60; // list entries before and after the current one; more would slow the page
  const STEP = 0.05; // nats, by which the keys [ and ] change the cutoff
  const NAMES = { value: "raw reward", reward: "normalised reward", perToken: "reward per token" };
  const $ = (id) => document.getElementById(id);
  const state = { current: 0, shown: examples.map((_, n) => n), cutoffs: views.map((v) => v.cutoff) };
  let panels = [];

  // ---- small helpers -------------------------------------------------------------------------

  function make(tag, properties = {}, children = []) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }

  const number = (value, digits = 3) => (value === null ? "–" : value.toFixed(digits));
  /** Three significant digits, because a reward per token is small where segments are long. */
  const reward = (part, name) =>
    name === "perToken" ? String(Number(part[name].toPrecision(3))) : number(part[name]);
  const measure = () => $("measure")?.value ?? null;
  const traceOf = (view, n) => traces[view.traces][n];

  let pending = false;
  function soon(work) {
    if (pending) return;
    pending = true;
    requestAnimationFrame(() => {
      pending = false;
      work();
    });
  }

  /** The scale of rewards for shading: 1 for normalised ones, else their standard deviation. */
  function scaleOf(parts, name) {
    if (name === "reward") return { centre: 0, unit: 1 };
    const all = parts.map((part) => part[name]);
    const centre = name === "value" ? all.reduce((a, b) => a + b, 0) / all.length : 0;
    const spread = Math.sqrt(all.reduce((a, b) => a + (b - centre) ** 2, 0) / all.length);
    return { centre, unit: spread || 1 };
  }

  // ---- the text of one response --------------------------------------------------------------

  function describe(part, k, parts) {
    const length = part.end - part.start + 1;
    const rewards = Object.entries(NAMES)
      .filter(([name]) => part[name] !== null)
      .map(([name, title]) => `${title} ${reward(part, name)}`);
    const tokens = `${length} token${length > 1 ? "s" : ""}`;
    const entropy = part.entropy === null ? [] : [`entropy at its end ${number(part.entropy)}`];
    return [`segment ${k + 1} of ${parts.length}: ${tokens}`, ...entropy, ...rewards].join("\n");
  }

  function tokenSpan(trace, j) {
    const from = denserl.starts(trace);
    const text = trace.text.slice(from[j], from[j + 1]);
    const span = make("span", { textContent: text, className: text ? "" : "part" });
    if (text.includes("\n")) span.classList.add("newline");
    span.dataset.j = j;
    return span;
  }

  function shadeOf(part, trace, j, k, scale, top) {
    const kind = $("shade").value;
    const tint = (name, share) => `color-mix(in srgb, var(${name}) ${Math.round(share * 55)}%, transparent)`;
    if (kind === "entropy") return trace.entropy ? tint("--accent", trace.entropy[j] / top) : "";
    if (kind === "segments" || !measure()) return tint("--accent", k % 2 ? 0.1 : 0.35);
    const z = (part[measure()] - scale.centre) / scale.unit;
    return tint(z < 0 ? "--warm" : "--cool", Math.min(Math.abs(z) / 2.5, 1));
  }

  function segmentSpan(panel, part, k, scale) {
    const { trace, parts } = panel;
    const tokens = [];
    for (let j = part.start; j <= part.end; j++) {
      const span = tokenSpan(trace, j);
      span.style.background = shadeOf(part, trace, j, k, scale, panel.top);
      tokens.push(span);
    }
    const classes = ["segment"];
    if (part.peak) classes.push("peak");
    if (measure()) {
      const z = (part[measure()] - scale.centre) / scale.unit;
      classes.push(z < 0 ? "low" : "high");
      if (Math.abs(z) > 1) classes.push("strong");
    }
    const segment = make("span", { className: classes.join(" "), tabIndex: k ? -1 : 0 }, tokens);
    segment.dataset.k = k;
    segment.setAttribute("role", "listitem");
    segment.setAttribute("aria-label", `${describe(part, k, parts)}: ${segment.textContent}`);
    return segment;
  }

  function fillText(panel) {
    const { trace, parts, text } = panel;
    const scale = measure() ? scaleOf(parts, measure()) : null;
    const pieces = parts.map((part, k) => segmentSpan(panel, part, k, scale));
    for (let j = parts.at(-1).end + 1; j < trace.sizes.length; j++) {
      const rest = tokenSpan(trace, j);
      rest.classList.add("outside");
      pieces.push(rest);
    }
    text.replaceChildren(...pieces);
  }

  // ---- one response: heading, text, chart, table ---------------------------------------------

  function fillTable(panel) {
    if (!panel.details.open) return;
    const { trace, parts } = panel;
    const shown = Object.keys(NAMES).filter((name) => parts[0][name] !== null);
    const from = denserl.starts(trace);
    const head = ["#", "tokens", "end entropy", ...shown.map((name) => NAMES[name])];
    const cell = (textContent) => make("td", { textContent, className: "number" });
    const rows = parts.map((part, k) =>
      make("tr", {}, [
        ...[k + 1, part.end - part.start + 1, number(part.entropy)].map(cell),
        ...shown.map((name) => cell(reward(part, name))),
        make("td", { textContent: trace.text.slice(from[part.start], from[part.end + 1]) }),
      ]),
    );
    const titles = head.map((textContent) => make("th", { textContent, className: "number" }));
    const top = make("thead", {}, [make("tr", {}, [...titles, make("th", { textContent: "text" })])]);
    panel.table.replaceChildren(make("table", {}, [top, make("tbody", {}, rows)]));
  }

  function update(panel) {
    const { v, trace } = panel;
    panel.parts = denserl.segments(trace, views[v], state.cutoffs[v]);
    const { parts } = panel;
    const score = denserl.score(parts, views[v].aggregate);
    const facts = [`${parts.length} segment${parts.length > 1 ? "s" : ""}, ${trace.sizes.length} tokens`];
    if (score !== null) facts.unshift(`score ${number(score)}`);
    if (!trace.terminated) facts.push("cut at the length limit");
    panel.facts.textContent = facts.join(" · ");
    fillText(panel);
    fillTable(panel);
  }

  /** A range from the smallest to the largest number, with 0 and a margin. */
  function range(numbers) {
    const [low, high] = [Math.min(0, ...numbers), Math.max(0, ...numbers)];
    const air = (high - low || 1) * 0.06;
    return [low < 0 ? low - air : 0, high > 0 ? high + air : 0];
  }

  function updateAll() {
    panels.forEach(update);
    const chosen = measure();
    const ranges = {
      entropy: range([...panels.map((panel) => panel.top), ...state.cutoffs]),
      reward: range(panels.flatMap(({ parts }) => (chosen ? parts.map((part) => part[chosen]) : []))),
    };
    for (const { chart, trace, parts, v } of panels) {
      const shown = { trace, parts, cutoff: state.cutoffs[v], measure: chosen };
      charts.response(chart, { ...shown, title: NAMES[chosen], ranges });
    }
  }

  function makePanel(v, n) {
    const trace = traceOf(views[v], n);
    const title = [trace.side || "response", views.length > 1 ? "AB"[v] : ""].join(" ").trim();
    const panel = {
      v, trace,
      top: trace.entropy ? Math.max(...trace.entropy, 1e-9) : 1,
      facts: make("p", { className: "quiet" }),
      text: make("div", { className: "answer", dir: "auto" }),
      chart: make("div", { className: "chart" }),
      table: make("div", { className: "segments", tabIndex: 0 }),
      details: make("details", {}, [make("summary", { textContent: "Table of segments" })]),
    };
    panel.text.setAttribute("role", "list");
    panel.text.setAttribute("aria-label", `segments of ${title}`);
    panel.chart.setAttribute("role", "img");
    panel.chart.setAttribute("aria-label", `entropy and rewards of ${title}; the table has the numbers`);
    panel.details.append(panel.table);
    panel.details.addEventListener("toggle", () => fillTable(panel));
    const heading = make("h2", { textContent: title });
    panel.element = make("section", { className: "side panel" }, [heading, panel.facts, panel.text, panel.chart, panel.details]);
    panel.element.panel = panel;
    return panel;
  }

  function show(example) {
    state.current = example;
    const { label, prompt, responses } = examples[example] ?? { responses: [] };
    for (const panel of panels) Plotly.purge(panel.chart);
    panels = responses.flatMap((n) => views.map((_, v) => makePanel(v, n)));
    const sides = make("div", { className: "sides" }, panels.map((panel) => panel.element));
    const words = make("p", { className: "prompt", dir: "auto", textContent: prompt });
    $("example").replaceChildren(make("h2", { textContent: label, dir: "auto" }), ...(prompt ? [words] : []), sides);
    updateAll();
    fillList();
    tell();
  }

  // ---- the list of examples ------------------------------------------------------------------

  function fillList() {
    const at = Math.max(state.shown.indexOf(state.current), 0);
    const first = Math.max(at - WINDOW, 0);
    const near = state.shown.slice(first, at + WINDOW);
    const items = near.map((n) => {
      const { label, prompt } = examples[n];
      const name = make("small", { textContent: label.split("/").at(-1) });
      const button = make("button", { type: "button", title: label }, [prompt.slice(0, 80) || "–", name]);
      if (n === state.current) button.setAttribute("aria-current", "true");
      button.addEventListener("click", () => show(n));
      return make("li", {}, [button]);
    });
    $("list").replaceChildren(...items);
    const current = $("list").querySelector("[aria-current]");
    if (current) $("list").scrollTop = current.offsetTop - $("list").offsetTop - 60;
    const hidden = state.shown.length - near.length;
    $("more").textContent = hidden ? `and ${hidden} more` : "";
    const place = state.shown.length ? `${at + 1} of ${state.shown.length}` : "no match";
    $("position").textContent = place;
  }

  function search() {
    const words = $("search").value.toLowerCase();
    const has = (text) => text.toLowerCase().includes(words);
    state.shown = examples.flatMap((example, n) => {
      const texts = example.responses.map((r) => traces[0][r].text);
      return [example.label, example.prompt, ...texts].some(has) ? [n] : [];
    });
    if (state.shown.length && !state.shown.includes(state.current)) show(state.shown[0]);
    else fillList();
  }

  function move(by) {
    const at = state.shown.indexOf(state.current) + by;
    if (at >= 0 && at < state.shown.length) show(state.shown[at]);
  }

  // ---- cutoffs -------------------------------------------------------------------------------

  const controls = [...document.querySelectorAll(".view")];

  function showCutoff(v) {
    controls[v].querySelector(".slider").value = state.cutoffs[v];
    controls[v].querySelector(".exact").value = Number(state.cutoffs[v].toFixed(4));
  }

  function setCutoff(v, cutoff) {
    if (views[v].cutoff === null || !Number.isFinite(cutoff)) return;
    const own = cutoff === views[v].cutoff;
    state.cutoffs[v] = own ? cutoff : Math.max(Number(cutoff.toFixed(4)), 0); // what the data holds
    showCutoff(v);
    soon(() => {
      updateAll();
      tell();
    });
  }

  /** Totals over all examples at the current cutoffs. */
  function tell() {
    const all = views.map((view, v) =>
      traces[view.traces].map((trace) => denserl.endsOf(trace, state.cutoffs[v])),
    );
    views.forEach((view, v) => {
      const segments = all[v].reduce((sum, ends) => sum + ends.length, 0);
      const tokens = all[v].reduce((sum, ends) => sum + ends.at(-1) + 1, 0);
      const moved = state.cutoffs[v] !== view.cutoff && view.ready;
      controls[v].querySelector(".summary").textContent =
        `all ${all[v].length} responses: ${(segments / all[v].length).toFixed(1)} segments of ` +
        `${(tokens / segments).toFixed(1)} tokens` +
        (moved ? ` · reward model and normaliser were made for ${number(view.cutoff, 4)}` : "");
    });
    if (views.length < 2) return;
    const sum = [0, 0, 0];
    all[0].forEach((ends, n) => {
      const [a, b] = [ends, all[1][n]].map((e, v) => denserl.places(traceOf(views[v], n), e));
      denserl.agreement(a, b).forEach((count, place) => (sum[place] += count));
    });
    const f1 = sum[0] + sum[1] ? (2 * sum[2]) / (sum[0] + sum[1]) : 1;
    $("agreement").textContent =
      `A has ${sum[0]} boundaries inside responses, B ${sum[1]}; both have ${sum[2]} (F1 ${f1.toFixed(3)})`;
  }

  controls.forEach((row, v) => {
    if (views[v].cutoff === null) return;
    const slider = row.querySelector(".slider");
    const highest = traces[views[v].traces].reduce(
      (top, trace) => trace.entropy.reduce((a, b) => Math.max(a, b), top),
      views[v].cutoff,
    );
    slider.max = Math.ceil(highest * 10) / 10;
    slider.addEventListener("input", () => setCutoff(v, Number(slider.value)));
    const exact = row.querySelector(".exact");
    exact.addEventListener("input", () => exact.value && setCutoff(v, Number(exact.value)));
    row.querySelector(".reset").addEventListener("click", () => setCutoff(v, views[v].cutoff));
    showCutoff(v);
  });

  // ---- pointer and keys ----------------------------------------------------------------------

  function tip(target) {
    const box = $("tip");
    const token = target.closest?.("[data-j]");
    const segment = target.closest?.(".answer .segment");
    const panel = target.closest?.(".side")?.panel;
    box.hidden = !panel || !(token || segment);
    if (box.hidden) return;
    const lines = [];
    if (token) {
      const j = Number(token.dataset.j);
      const { trace } = panel;
      lines.push(`${JSON.stringify(token.textContent)} token ${j + 1} of ${trace.sizes.length}`);
      const last = j === trace.sizes.length - 1;
      if (trace.entropy && !last) lines.push(`entropy ${number(trace.entropy[j])} nats`);
      if (trace.values) lines.push(`reward model ${number(trace.values[j])}`);
    }
    if (segment) lines.push(describe(panel.parts[segment.dataset.k], Number(segment.dataset.k), panel.parts));
    box.textContent = lines.join("\n");
    const around = (token ?? segment).getBoundingClientRect();
    const below = around.bottom + 6 + box.offsetHeight < innerHeight;
    box.style.top = `${below ? around.bottom + 6 : Math.max(around.top - box.offsetHeight - 6, 0)}px`;
    box.style.left = `${Math.max(Math.min(around.left, innerWidth - box.offsetWidth - 8), 0)}px`;
  }

  function focusSegment(from, by) {
    const segments = [...from.closest(".answer").querySelectorAll(".segment")];
    const next = segments[segments.indexOf(from) + by];
    if (!next) return;
    from.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  const KEYS = {
    j: () => move(1),
    k: () => move(-1),
    "[": () => views.forEach((_, v) => setCutoff(v, state.cutoffs[v] - STEP)),
    "]": () => views.forEach((_, v) => setCutoff(v, state.cutoffs[v] + STEP)),
    0: () => views.forEach((view, v) => setCutoff(v, view.cutoff)),
    "/": () => $("search").focus(),
    ArrowRight: (target) => target.matches(".segment") && focusSegment(target, 1),
    ArrowLeft: (target) => target.matches(".segment") && focusSegment(target, -1),
  };

  document.addEventListener("keydown", (event) => {
    const field = event.target.matches("input, select, textarea");
    if (event.key === "Escape" && field) event.target.blur();
    if (field || event.ctrlKey || event.metaKey || event.altKey || !(event.key in KEYS)) return;
    if (event.key.startsWith("Arrow") && !event.target.matches(".segment")) return; // they scroll
    event.preventDefault();
    KEYS[event.key](event.target);
  });
  document.addEventListener("mouseover", (event) => tip(event.target));
  document.addEventListener("focusin", (event) => tip(event.target));
  document.addEventListener("scroll", () => ($("tip").hidden = true), true);
  $("toolbar").addEventListener("submit", (event) => event.preventDefault());
  $("search").addEventListener("input", search);
  $("previous").addEventListener("click", () => move(-1));
  $("next").addEventListener("click", () => move(1));
  for (const id of ["measure", "shade"]) $(id)?.addEventListener("change", updateAll);

  function drawStatistics() {
    if (!statistics) return;
    const series = (name) => statistics.map((one) => ({ name: one.name, own: one.own, histogram: one[name] }));
    charts.cumulative($("lengths"), series("lengths"), "tokens in a segment");
    charts.cumulative($("counts"), series("counts"), "segments in a response");
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    updateAll();
    drawStatistics();
  });
  if (examples.length) show(0);
  drawStatistics();
})();
