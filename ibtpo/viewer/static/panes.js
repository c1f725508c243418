// Trees: the table of prompts, and one tree or two beside each other.

class Pane {
  constructor(runs, settings) {
    Object.assign(this, { runs, settings });
    this.title = el("header");
    this.view = new TreeView((index) => this.detail.show(this.tree, index));
    this.detail = new Detail((index) => this.view.pick(index));
    this.message = el("p", { class: "message" });
    const bar = el("div", { class: "splitter", title: "drag to resize", onpointerdown: (event) => this.resize(event) });
    this.node = el("section", { class: "pane" }, this.title, el("div", { class: "canvas" }, this.view.node, this.message), bar, this.detail.node);
  }

  resize(event) {
    event.preventDefault();
    const bottom = this.node.getBoundingClientRect().bottom;
    const onmove = (e) => { this.detail.node.style.flexBasis = `${Math.max(60, Math.min(bottom - e.clientY, innerHeight - 260))}px`; };
    addEventListener("pointermove", onmove);
    addEventListener("pointerup", () => removeEventListener("pointermove", onmove), { once: true });
  }

  async open(row) {
    this.row = row;
    const run = this.runs[row.run], name = this.runs.length > 1 ? [el("b", { class: `runname run${row.run}`, text: visible(run.name) })] : [];
    const title = el("span", { class: "mono prompt", title: visible(row.prompt) }, el("bdi", { text: oneLine(row.prompt) }));
    this.title.replaceChildren(...name, title, el("span", { text: `step ${row.step}` }), el("span", {}, el("b", { text: `${row.right} of ${row.leaves}` }), " right"), ...(row.answer ? [el("span", {}, "answer ", el("bdi", { class: "mono", text: oneLine(row.answer).slice(0, 80) }))] : []));
    try {
      const tree = await run.tree(row.file);
      if (this.row !== row) return;
      this.tree = tree;
      this.message.textContent = "";
      this.apply();
      this.view.show(tree);
    } catch (error) {
      this.message.textContent = `The tree cannot be shown: ${error.message}`;
    }
  }

  apply() {
    this.view.colour = this.settings.colour;
    this.detail.heat = this.settings.heat;
  }

  repaint() {
    this.apply();
    if (!this.tree) return;
    this.view.paint();
    this.detail.show(this.tree, this.view.picked);
  }
}

class Trees {
  constructor(runs) {
    this.runs = runs;
    this.settings = { colour: "value", heat: "log-prob" };
    this.panes = [new Pane(runs, this.settings)];
    this.area = el("div", { class: "panes" });
    this.table = new PromptTable(runs, (row, beside) => this.open(row, beside));
    const repaint = () => this.panes.forEach((pane) => pane.repaint()), key = (name) => { this.settings[name[0]] = name[1]; repaint(); };
    this.heat = choice("tokens", [["log-prob", "log-prob"], ["entropy", "entropy"], ["plain", "plain"]], "log-prob", (v) => key(["heat", v]));
    const act = (text, title, run) => el("button", { type: "button", text, title, onclick: () => this.panes.forEach(run) });
    const tools = el("div", { class: "controls treetools" },
      choice("boxes", [["value", "value V", "share of right leaves below"], ["log-prob", "log-prob", "mean over the step's tokens"], ["entropy", "entropy", "mean over the step's tokens"]], "value", (v) => key(["colour", v])), this.heat,
      el("span", { class: "choice" }, act("fold", "join steps nothing branches off", ({ view }) => { if (view.tree) { view.fold = !view.fold; view.draw(); view.fit(); view.pick(view.picked); } }), act("−", "zoom out (−)", ({ view }) => view.zoom(0.8)), act("+", "zoom in (+)", ({ view }) => view.zoom(1.25)), act("fit", "whole tree (f)", ({ view }) => view.tree && view.fit(true))),
      this.closer = el("button", { type: "button", class: "closer", text: "one tree", hidden: true, onclick: () => this.split(false) }), legend());
    this.node = el("section", { class: "trees" }, this.table.node, el("div", { class: "main" }, tools, this.area,
      el("p", { class: "hint", text: "arrows walk the tree · + − zoom · f whole tree · n p next and previous prompt · h heat · / filter · shift-click a prompt: a second tree beside the first" })));
    this.split(false);
  }

  split(two) {
    if (two && this.panes.length === 1) this.panes.push(new Pane(this.runs, this.settings));
    if (!two) this.panes.length = 1;
    this.closer.hidden = !two;
    this.area.replaceChildren(...this.panes.map((pane) => pane.node));
  }

  /** Show a tree; of two runs, the other's tree of the same prompt (or of the nearest step) comes beside it. */
  open(row, beside) {
    if (beside) { this.split(true); this.panes[1].open(row); return; }
    this.panes[0].open(row);
    if (this.runs.length < 2) return;
    const others = this.runs[1 - row.run].trees, same = others.filter((o) => o.prompt === row.prompt), near = (same.length ? same : others);
    if (!near.length) return;
    const other = near.reduce((a, b) => (Math.abs(b.step - row.step) < Math.abs(a.step - row.step) || (Math.abs(b.step - row.step) === Math.abs(a.step - row.step) && Math.abs(b.index - row.index) < Math.abs(a.index - row.index)) ? b : a));
    this.split(true);
    const [left, right] = row.run === 0 ? [row, other] : [other, row];
    this.panes[0].open(left);
    this.panes[1].open(right);
  }

  /** On first sight: the last tree with mixed outcomes. */
  begin() {
    if (this.panes[0].row || !this.table.rows.length) return;
    const mixed = this.table.rows.filter((row) => row.right > 0 && row.right < row.leaves);
    this.table.open(mixed.at(-1) ?? this.table.rows.at(-1), false);
  }

  refresh() { this.table.refresh(); this.begin(); }

  key(event) {
    const acts = {
      n: () => this.table.step(1), p: () => this.table.step(-1), "/": () => this.table.text.focus(),
      h: () => { const all = [...this.heat.querySelectorAll("button")]; all[(all.findIndex((b) => b.getAttribute("aria-pressed") === "true") + 1) % all.length].click(); },
    };
    if (acts[event.key]) { event.preventDefault(); acts[event.key](); } else if (this.panes[0].tree) this.panes[0].view.key(event);
  }
}

function legend() {
  const mark = (leaf, text) => el("span", {}, svg("svg", { width: 18, height: 18 }, outcome(leaf, 9, 9)), text);
  return el("div", { class: "legend" }, el("span", {}, "low ", el("i", { class: "ramp" }), " high"), el("span", {}, el("i", { class: "turnmark", text: "2" }), "branched in round 2"),
    mark({ reward: 1, finish: "stop" }, "right"), mark({ reward: 0, finish: "stop" }, "wrong"), mark({ reward: 0, finish: "length" }, "cut off"), mark({ reward: 0.5, finish: "stop" }, "partly"));
}
