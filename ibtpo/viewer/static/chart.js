// Line charts on a canvas: one drawing call a frame, however many points; colours come from the style sheet.

const PLOT = { left: 46, right: 12, top: 10, bottom: 24, height: 190 };
const shared = { axis: "step", log: false, smooth: 0.6, x: null, charts: new Set() };

/** About four round numbers that cover [low, high]. */
function niceTicks(low, high, count = 4) {
  if (!(high - low > 1e-12 * Math.max(1, Math.abs(high)))) {
    const pad = (Math.abs(low) || 1) * 0.1;
    [low, high] = [low - pad, high + pad];
  }
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 2.5, 5, 10].find((f) => f * power >= rough * 0.999);
  const ticks = [];
  for (let i = Math.floor(low / step + 1e-9); i <= Math.ceil(high / step - 1e-9); i++) ticks.push(+(i * step).toPrecision(12));
  return ticks;
}

/** A debiased exponential mean. */
function smoothed(points, weight) {
  let sum = 0, norm = 0;
  return points.map(([x, , mean]) => { sum = weight * sum + (1 - weight) * mean; norm = weight * norm + (1 - weight); return [x, sum / norm]; });
}

/**
 * spec: { title, note, lines: [{ label, metric, low, high, dots }], unit }, drawn for every run;
 * the second run is dashed.
 */
class Chart {
  constructor(spec, runs) {
    Object.assign(this, { spec, runs, log: false });
    this.canvas = el("canvas", { role: "img", "aria-label": spec.title });
    this.key = el("span", { class: "key" });
    this.logButton = el("button", { type: "button", class: "small", text: "log", title: "logarithmic scale", "aria-pressed": false, onclick: () => {
      this.log = !this.log;
      this.logButton.setAttribute("aria-pressed", this.log);
      this.draw();
    } });
    this.node = el("figure", { class: "card chart", "data-metrics": spec.lines.map((l) => l.metric).join(" ") },
      el("figcaption", {}, el("div", { class: "head" }, el("h3", { text: spec.title }), this.logButton), el("p", { class: "note", text: spec.note, title: spec.note }), this.key),
      this.canvas);
    this.canvas.addEventListener("pointermove", (event) => this.hover(event));
    this.canvas.addEventListener("pointerleave", () => { shared.x = null; tip.hide(); redraw(); });
    shared.charts.add(this);
    this.watch = new IntersectionObserver((entries) => { this.seen = entries.at(-1).isIntersecting; if (this.seen) this.draw(); }, { rootMargin: "200px" });
    this.watch.observe(this.node);
  }

  get empty() { return !this.spec.lines.some((line) => this.runs.some((run) => run.metrics.points.get(line.metric)?.length)); }

  /** Everything there is to draw: a curve a run and line. */
  curves() {
    const many = this.runs.length > 1, curves = [];
    this.spec.lines.forEach((line, i) => this.runs.forEach((run, r) => {
      const raw = run.series(line.metric, shared.axis);
      if (!raw.length) return;
      const single = this.spec.lines.length === 1;
      curves.push({
        raw, dash: many && r === 1 && !single, dots: line.dots || raw.length < 3,
        points: line.dots || raw.length < 20 || shared.smooth === 0 ? raw : smoothed(raw, shared.smooth),
        color: `--s${many && single ? r : i}`,
        low: line.low && run.series(line.low, shared.axis), high: line.high && run.series(line.high, shared.axis),
        label: [line.label, many ? visible(run.name) : ""].filter(Boolean).join(" · ") || this.spec.title,
      });
    }));
    return curves;
  }

  draw() {
    if (!this.seen && !this.force) { this.stale = true; return; }
    const width = this.canvas.clientWidth || 360, scale = devicePixelRatio || 1, { left, right, top, bottom, height } = PLOT;
    if (this.canvas.width !== Math.round(width * scale)) { this.canvas.width = Math.round(width * scale); this.canvas.height = height * scale; }
    const g = this.canvas.getContext("2d"), style = getComputedStyle(document.body), color = (name) => style.getPropertyValue(name).trim();
    g.setTransform(scale, 0, 0, scale, 0, 0);
    g.clearRect(0, 0, width, height);
    const curves = this.curves(), log = this.log || shared.log;
    if (!curves.length) return;
    const usable = (y) => known(y) && (!log || y > 0), ys = [], xs = [];
    for (const c of curves) {
      for (const list of [c.raw, c.low ?? [], c.high ?? []]) for (const [x, y] of list) if (usable(y)) { ys.push(y); xs.push(x); }
    }
    g.font = "11px system-ui, sans-serif";
    if (!ys.length) { g.fillStyle = color("--faint"); g.fillText("no positive values", left, height / 2); return; }
    const bounds = (list) => list.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    let [low, high] = bounds(ys);
    if (!log && low > 0 && low < 0.6 * high) low = 0;
    const change = log ? Math.log10 : (y) => y;
    const ticks = log ? logTicks(low, high) : niceTicks(low, high);
    const y0 = change(Math.min(low, ticks[0])), y1 = change(Math.max(high, ticks.at(-1))), [x0, x1] = bounds([0, ...xs]);
    const px = (x) => left + (x - x0) / (x1 - x0 || 1) * (width - left - right);
    const py = (y) => height - bottom - (change(y) - y0) / (y1 - y0 || 1) * (height - top - bottom);
    this.frame = { px, x0, x1, width, curves };
    g.lineWidth = 1;
    for (const tick of ticks) {
      g.strokeStyle = color(tick === 0 && low < 0 ? "--faint" : "--rule");
      const y = Math.round(py(tick)) + 0.5;
      line(g, [[left, y], [width - right, y]]);
      g.fillStyle = color("--faint"); g.textAlign = "right"; g.fillText(number(tick), left - 7, y + 4);
    }
    const across = niceTicks(x0, x1, Math.max(2, Math.min(5, width / 90))).filter((t) => t <= x1 && (shared.axis !== "step" || Number.isInteger(t)));
    g.textAlign = "center";
    for (const tick of across) g.fillText(number(tick), px(tick), height - 7);
    for (const c of curves) {
      g.strokeStyle = g.fillStyle = color(c.color);
      const place = (list) => thin(list.filter(([, y]) => usable(y)).map(([x, y]) => [px(x), py(y)]));
      if (c.low && c.high && c.low.length === c.raw.length && c.high.length === c.raw.length) {
        g.globalAlpha = 0.75; g.lineWidth = 1.5;
        c.low.forEach(([x, y], i) => { if (usable(y)) line(g, [[px(x), py(y)], [px(x), py(c.high[i][1])]]); });
      }
      if (c.points !== c.raw && shared.smooth > 0) { g.globalAlpha = 0.28; g.lineWidth = 1; line(g, place(c.raw)); }
      g.globalAlpha = 1; g.lineWidth = 2; g.lineJoin = "round";
      g.setLineDash(c.dash ? [6, 4] : []);
      line(g, place(c.points));
      g.setLineDash([]);
      if (c.dots || c.raw.length <= 40) for (const [x, y] of place(c.points)) { g.beginPath(); g.arc(x, y, c.dots ? 3.5 : 2.2, 0, 7); g.fill(); }
    }
    if (shared.x !== null && shared.x >= x0 && shared.x <= x1) {
      g.strokeStyle = color("--faint"); g.lineWidth = 1; g.setLineDash([3, 3]);
      line(g, [[px(shared.x), top], [px(shared.x), height - bottom]]);
      g.setLineDash([]);
    }
    const labels = curves.length > 1 || this.spec.lines[0].label ? curves : [];
    this.key.replaceChildren(...labels.map((c) => {
      const mark = el("i", { class: c.dots ? "point" : c.dash ? "dash" : "" });
      mark.style.setProperty("--c", `var(${c.color})`);
      return el("span", {}, mark, c.label);
    }));
  }

  hover(event) {
    if (!this.frame) return;
    const at = event.clientX - this.canvas.getBoundingClientRect().left, { x0, x1, width, curves } = this.frame;
    const x = x0 + (at - PLOT.left) / (width - PLOT.left - PLOT.right) * (x1 - x0);
    let best = null;
    for (const c of curves) { const p = nearest(c.raw, x); if (best === null || Math.abs(p[0] - x) < Math.abs(best - x)) best = p[0]; }
    shared.x = best;
    redraw();
    const lines = [el("div", { class: "at", text: shared.axis === "step" ? `step ${best}` : `${number(best)} tokens` })];
    for (const c of curves) {
      const i = nearestIndex(c.raw, best), [px, y] = c.raw[i];
      if (Math.abs(px - best) > (x1 - x0) / 8) continue;
      const value = number(y) + (c.points !== c.raw && shared.smooth > 0 ? `  (smooth ${number(c.points[i][1])})` : "");
      const mark = el("i");
      mark.style.setProperty("--c", `var(${c.color})`);
      lines.push(el("div", {}, mark, `${c.label}  `, el("b", { text: value })));
    }
    tip.show(event.clientX, event.clientY, lines);
  }
}

function logTicks(low, high) {
  const from = Math.floor(Math.log10(low)), to = Math.ceil(Math.log10(high)), by = Math.max(1, Math.ceil((to - from) / 5)), ticks = [];
  for (let e = from; e <= Math.max(to, from + 1); e += by) ticks.push(+(10 ** e).toPrecision(6));
  return ticks;
}

function line(g, points) {
  g.beginPath();
  points.forEach(([x, y], i) => (i ? g.lineTo(x, y) : g.moveTo(x, y)));
  g.stroke();
}

/** Of the points in a pixel column the first, the extremes and the last: what can be seen of them. */
function thin(points) {
  if (points.length < 1500) return points;
  const kept = [];
  for (let i = 0; i < points.length;) {
    let j = i, low = i, high = i;
    for (; j < points.length && Math.floor(points[j][0]) === Math.floor(points[i][0]); j++) {
      if (points[j][1] < points[low][1]) low = j;
      if (points[j][1] > points[high][1]) high = j;
    }
    for (const k of [...new Set([i, low, high, j - 1])].sort((a, b) => a - b)) kept.push(points[k]);
    i = j;
  }
  return kept;
}

function nearestIndex(points, x) {
  let low = 0, high = points.length - 1;
  while (low < high) { const mid = (low + high) >> 1; if (points[mid][0] < x) low = mid + 1; else high = mid; }
  return low > 0 && Math.abs(points[low - 1][0] - x) <= Math.abs(points[low][0] - x) ? low - 1 : low;
}
const nearest = (points, x) => points[nearestIndex(points, x)];

let drawing = 0;
function redraw() {
  if (drawing) return;
  drawing = requestAnimationFrame(() => { drawing = 0; for (const chart of shared.charts) if (chart.node.isConnected) chart.draw(); });
}
