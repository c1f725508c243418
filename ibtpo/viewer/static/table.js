// The prompts whose trees are kept: filtered, sorted, and drawn only where they are in sight.

const ROW = 32;

class PromptTable {
  constructor(runs, onopen) {
    Object.assign(this, { runs, onopen, sort: "step", down: false, current: null, rows: [] });
    const input = (props) => el("input", { ...props, oninput: () => this.refresh() });
    this.text = input({ type: "search", placeholder: "prompt or answer", "aria-label": "filter by prompt text", class: "wide" });
    this.from = input({ type: "number", min: 0, placeholder: "from", "aria-label": "from step" });
    this.to = input({ type: "number", min: 0, placeholder: "to", "aria-label": "to step" });
    this.least = input({ type: "number", min: 0, max: 1, step: 0.05, placeholder: "from", "aria-label": "least reward" });
    this.most = input({ type: "number", min: 0, max: 1, step: 0.05, placeholder: "to", "aria-label": "most reward" });
    this.mixed = el("input", { type: "checkbox", onchange: () => this.refresh() });
    this.count = el("span", { class: "count" });
    const column = (key, text, title) => el("button", { type: "button", text, title, "data-key": key, onclick: () => {
      this.down = this.sort === key ? !this.down : key === "reward" || key === "tokens";
      this.sort = key;
      this.refresh();
    } });
    this.head = el("div", { class: "row head" }, column("step", "step"), column("prompt", "prompt"), column("tokens", "tokens"), column("reward", "right", "sort by mean reward"));
    this.space = el("div", { class: "space" });
    this.list = el("div", { class: "list", tabindex: 0, role: "listbox", "aria-label": "prompts", onscroll: () => this.draw(), onkeydown: (event) => {
      const by = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10 }[event.key];
      if (by) { event.preventDefault(); this.step(by); }
    } }, this.space);
    this.node = el("aside", { class: "prompts" },
      el("div", { class: "filters" }, this.text, el("div", { class: "range" }, el("span", { class: "label", text: "step" }), this.from, this.to), el("div", { class: "range" }, el("span", { class: "label", text: "reward" }), this.least, this.most),
        el("div", { class: "range" }, el("label", { class: "check" }, this.mixed, "mixed outcomes only"), this.count)), this.head, this.list);
    new ResizeObserver(() => this.draw()).observe(this.list);
    this.refresh();
  }

  refresh() {
    const words = this.text.value.toLowerCase().split(/\s+/).filter(Boolean), bound = (input, none) => (input.value === "" ? none : +input.value);
    const [from, to, least, most] = [bound(this.from, -Infinity), bound(this.to, Infinity), bound(this.least, -Infinity), bound(this.most, Infinity)];
    const all = this.runs.flatMap((run) => run.trees);
    this.rows = all.filter((row) => row.step >= from && row.step <= to && (row.reward ?? 0) >= least && (row.reward ?? 0) <= most
      && (!this.mixed.checked || (row.right > 0 && row.right < row.leaves)) && words.every((w) => `${row.prompt} ${row.answer}`.toLowerCase().includes(w)));
    const sign = this.down ? -1 : 1, key = this.sort;
    this.rows.sort((a, b) => sign * (key === "prompt" ? (a.prompt < b.prompt ? -1 : a.prompt > b.prompt ? 1 : 0) : (a[key] ?? -1) - (b[key] ?? -1)) || a.step - b.step || a.run - b.run || a.index - b.index);
    this.count.textContent = this.rows.length === all.length ? `${all.length} trees` : `${this.rows.length} of ${all.length}`;
    for (const button of this.head.children) button.setAttribute("aria-sort", button.dataset.key === key ? (this.down ? "descending" : "ascending") : "none");
    this.space.style.height = `${this.rows.length * ROW}px`;
    this.draw();
  }

  draw() {
    const first = Math.max(0, Math.floor(this.list.scrollTop / ROW) - 4), last = Math.min(this.rows.length, first + Math.ceil((this.list.clientHeight || 600) / ROW) + 8);
    this.space.replaceChildren(...this.rows.slice(first, last).map((row, i) => this.row(row, first + i)));
  }

  row(row, at) {
    const bar = el("span", { class: "bar" });
    bar.style.setProperty("--p", `${100 * row.right / (row.leaves || 1)}%`);
    const prompt = oneLine(row.prompt);
    const node = el("div", { class: `row run${row.run}`, role: "option", "aria-selected": this.current === row, title: visible(row.prompt), onclick: (event) => this.open(row, event.shiftKey) },
      el("span", { class: "num", text: row.step }), el("bdi", { class: "mono text", text: prompt || "(empty)" }), el("span", { class: "num", text: row.tokens }), el("span", { class: "right" }, bar, el("span", { class: "num", text: `${row.right}/${row.leaves}` })));
    node.style.top = `${at * ROW}px`;
    if (this.runs.length > 1) node.firstChild.prepend(el("i", { class: "runmark", title: visible(this.runs[row.run].name) }));
    return node;
  }

  open(row, beside) {
    if (!beside) this.current = row;
    this.draw();
    this.onopen(row, beside);
  }

  /** Open the row `by` places below the current one. */
  step(by) {
    if (!this.rows.length) return;
    const at = Math.max(0, Math.min(this.rows.length - 1, this.rows.indexOf(this.current) + by));
    if (at * ROW < this.list.scrollTop) this.list.scrollTop = at * ROW;
    if ((at + 1) * ROW > this.list.scrollTop + this.list.clientHeight) this.list.scrollTop = (at + 1) * ROW - this.list.clientHeight;
    this.open(this.rows[at], false);
  }
}
