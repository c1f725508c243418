// What the run came to, and its curves.

const KEY_CHARTS = [
  { title: "Reward", note: "mean over sampled trees, and held-out accuracy with its 95 % interval", lines: [
    { label: "all leaves", metric: "avg_rate" }, { label: "independent rollouts", metric: "avg_rate_iid" },
    { label: "held-out accuracy", metric: "eval_avg", low: "eval_avg_low", high: "eval_avg_high", dots: true }] },
  { title: "Eff-Rate", note: "prompts whose trajectories do not all have the same reward", lines: [{ metric: "eff_rate" }] },
  { title: "Cov(η₁, η₂)", note: "does confidence sit on what leads to the answer?", lines: [{ metric: "cov_eta1_eta2" }] },
  { title: "Entropy", note: "nats a token, at temperature 1 (sampler) and of the policy trained", lines: [{ label: "sampler", metric: "sampler_entropy" }, { label: "trained", metric: "entropy" }] },
  { title: "KL", note: "nats a token, k3 estimate", lines: [{ label: "to the sampling policy", metric: "kl_old_k3" }, { label: "to the reference", metric: "kl_ref_k3" }] },
  { title: "Response length", note: "sampled tokens of a trajectory, mean", lines: [{ metric: "response_length" }] },
  { title: "Seconds a step", note: "wall clock", lines: [{ label: "sampling", metric: "sampling_seconds" }, { label: "training", metric: "training_seconds" }, { label: "reward", metric: "reward_seconds" }] },
  { title: "Token efficiency", note: "trajectory tokens for a token computed", lines: [{ label: "sampling", metric: "sampling_efficiency" }, { label: "training", metric: "training_efficiency" }] },
  { title: "Sampling speed", note: "tokens a second", lines: [{ metric: "tokens_per_second" }] },
];

/** A chart for every metric; an interval's ends belong to what they bound. */
function metricSpecs(groups) {
  return groups.map((group) => ({
    title: group.title,
    specs: group.metrics.filter((m) => !/_(low|high)$/.test(m.name)).map((m) => ({
      title: m.name, note: m.meaning + (m.unit ? ` [${m.unit}]` : ""),
      lines: [{ metric: m.name, low: `${m.name}_low`, high: `${m.name}_high`, dots: m.name.startsWith("eval_") }],
    })),
  }));
}

class Overview {
  constructor(runs, data) {
    Object.assign(this, { runs, data });
    this.result = el("div", { class: "results" });
    this.charts = KEY_CHARTS.map((spec) => new Chart(spec, runs));
    this.configs = runs.map(() => el("pre", { class: "card mono" }));
    this.node = el("section", { class: "page" }, this.result, runs.some((run) => run.guided) ? el("p", { class: "warning", text: data.notAccuracy }) : null,
      el("h2", { text: "Learning curves" }), el("div", { class: "charts" }, ...this.charts.map((c) => c.node)),
      ...runs.map((run, i) => el("details", { class: "config" }, el("summary", { text: `Configuration of ${visible(run.name)}` }), this.configs[i])));
    this.refresh();
  }

  refresh() {
    this.result.replaceChildren(...this.runs.map((run, i) => summaryCard(run, i, this.runs.length > 1)));
    this.configs.forEach((node, i) => { node.textContent = visible(this.runs[i].config); });
    for (const chart of this.charts) chart.node.hidden = chart.empty;
    redraw();
  }
}

const percent = (value) => (100 * value).toFixed(1);

function summaryCard(run, index, named) {
  const { accuracies, amounts, steps } = run.summary ?? { accuracies: [], amounts: [], steps: 0 };
  const cell = (side, e) => el("td", { class: side }, ...(e ? [el("span", { class: "big", text: percent(e.value) }), el("span", { class: "range", text: `${percent(e.low)} to ${percent(e.high)}` })] : [el("span", { class: "range", text: "not evaluated" })]));
  const rows = accuracies.map((row) => {
    const gain = row.before && row.after ? row.after.value - row.before.value : null;
    return el("tr", {}, el("td", { class: "name" }, el("b", { text: row.name }), el("span", { text: row.meaning })), cell("before", row.before), cell("after", row.after),
      el("td", {}, gain === null ? null : el("span", { class: gain >= 0 ? "gain" : "loss", text: (gain >= 0 ? "+" : "\u2212") + percent(Math.abs(gain)) })),
      el("td", { class: "stripcell" }, strip(row)));
  });
  return el("article", { class: `run${index}` },
    named ? el("h3", { class: `runname run${index}`, text: visible(run.name) }) : null,
    el("ul", { class: "facts" }, ...[...(run.facts ?? []), `${steps} training step${steps === 1 ? "" : "s"}`].map((text) => el("li", { text: visible(text) }))),
    rows.length ? el("div", { class: "card result" }, el("table", {}, el("thead", {}, el("tr", {}, ...["Held-out accuracy, %", "before", "after", "change", "95 % intervals over prompts"].map((text) => el("th", { text })))), el("tbody", {}, ...rows))) : null,
    amounts.length ? el("dl", { class: "amounts" }, ...amounts.map(([name, value, note]) => el("div", { class: "card" }, el("dt", { text: name }), el("dd", { class: "value", text: value }), el("dd", { class: "note", text: note })))) : null);
}

function strip({ before, after, name }) {
  const x = (v) => 400 * v, parts = [svg("line", { class: "rail", x1: 0, x2: 400, y1: 13, y2: 13 })];
  for (const tick of [0, 25, 50, 75, 100]) parts.push(svg("text", { x: tick * 4, y: 32, text: tick }));
  if (before && after) parts.push(svg("line", { class: "link", x1: x(before.value), x2: x(after.value), y1: 13, y2: 13 }));
  for (const [side, e] of [["old", before], ["new", after]]) {
    if (e) parts.push(svg("line", { class: `bar ${side}`, x1: x(e.low), x2: x(e.high), y1: 13, y2: 13 }), svg("circle", { class: side, cx: x(e.value), cy: 13, r: 5.5 }));
  }
  return svg("svg", { class: "strip", viewBox: "-12 0 424 34", role: "img", "aria-label": `${name} on a line from 0 to 100 %` }, ...parts);
}

class Curves {
  constructor(runs, data) {
    this.runs = runs;
    this.find = el("input", { type: "search", placeholder: "find a metric", "aria-label": "find a metric", oninput: () => this.refresh() });
    this.groups = metricSpecs(data.groups).map(({ title, specs }) => {
      const charts = specs.map((spec) => new Chart(spec, runs));
      return { charts, node: el("section", {}, el("h2", { text: title }), el("div", { class: "charts" }, ...charts.map((c) => c.node))) };
    });
    this.none = el("p", { class: "lead", text: "Nothing was logged under such a name." });
    this.node = el("section", { class: "page" }, el("div", { class: "controls" }, this.find), ...this.groups.map((g) => g.node), this.none);
    this.refresh();
  }

  refresh() {
    const wanted = this.find.value.trim().toLowerCase();
    let any = false;
    for (const group of this.groups) {
      for (const chart of group.charts) chart.node.hidden = chart.empty || !`${chart.spec.title} ${chart.spec.note}`.toLowerCase().includes(wanted);
      group.node.hidden = group.charts.every((c) => c.node.hidden);
      any ||= !group.node.hidden;
    }
    this.none.hidden = any;
    redraw();
  }
}

/** The switches that hold for every chart. */
function chartControls() {
  const value = el("output", { text: shared.smooth.toFixed(2) });
  const slider = el("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: shared.smooth, "aria-label": "smoothing", oninput: () => {
    shared.smooth = +slider.value;
    value.textContent = shared.smooth.toFixed(2);
    redraw();
  } });
  return el("div", { class: "controls chartcontrols" },
    choice("x", [["step", "step"], ["tokens", "sampled tokens"]], shared.axis, (v) => { shared.axis = v; shared.x = null; redraw(); }),
    choice("y", [["linear", "linear"], ["log", "log"]], "linear", (v) => { shared.log = v === "log"; redraw(); }),
    el("label", { class: "choice" }, el("span", { class: "label", text: "smoothing" }), slider, value));
}
