// A tree as SVG boxes that can be panned, zoomed and walked with the keyboard.

const BOX = { height: 36, row: 46, gap: 22, margin: 10, narrow: 80, wide: 176, narrowLetters: 9, wideLetters: 22 };
const COLOURS = {
  value: (node) => node.value,
  "log-prob": (node) => (node.logprob.length ? 1 + Math.max(-1, mean(node.logprob)) : null),
  entropy: (node) => (node.entropy.length ? 1 - Math.min(1, mean(node.entropy)) : null),
};
const mean = (values) => values.reduce((a, b) => a + (b ?? 0), 0) / values.length;

class TreeView {
  constructor(onpick) {
    Object.assign(this, { onpick, colour: "value", fold: false, scale: 1, x: 0, y: 0, picked: 0 });
    this.world = svg("g");
    this.node = svg("svg", { class: "tree", tabindex: 0, role: "tree", "aria-label": "tree of steps" }, this.world);
    this.node.addEventListener("wheel", (event) => { event.preventDefault(); this.zoom(Math.exp(-event.deltaY * 0.0015), event); }, { passive: false });
    this.node.addEventListener("pointerdown", (event) => this.drag(event));
    this.node.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => { if (this.tree && this.fitted) this.fit(); }).observe(this.node);
  }

  show(tree) {
    this.tree = tree;
    const nodes = tree.nodes;
    const small = nodes.slice(1).every((node) => node.text.trim().length <= BOX.narrowLetters);
    this.fold = depthOf(nodes) > (small ? 40 : 14);
    this.draw();
    this.fit();
    const leaf = tree.nodes.findIndex((node) => node.finish);
    this.pick(Math.max(leaf, 0), false);
  }

  draw() {
    const nodes = this.tree.nodes, layout = (this.layout = layOut(nodes, this.fold));
    const small = !this.fold && nodes.slice(1).every((node) => node.text.trim().length <= BOX.narrowLetters);
    this.width = small ? BOX.narrow : BOX.wide;
    this.letters = small ? BOX.narrowLetters : BOX.wideLetters;
    const turns = new Map();
    for (const [turn, node] of this.tree.branched ?? []) turns.set(node, [...(turns.get(node) ?? []), turn]);
    this.edges = layout.boxes.map((box) => (box.parent === null ? null : this.edge(box)));
    this.boxes = layout.boxes.map((box) => this.box(box, turns));
    this.world.replaceChildren(...this.edges.filter(Boolean), ...this.boxes);
    this.paint();
  }

  left(box) { return BOX.margin + box.column * (this.width + BOX.gap); }
  top(box) { return BOX.margin + box.row * BOX.row; }

  /** A line from the parent through the gutter beside it, which no box covers. */
  edge(box) {
    const nodes = this.tree.nodes, above = this.layout.boxes[box.parent], begin = this.left(above) + this.width, end = this.left(box);
    const y0 = this.top(above) + BOX.height / 2, y1 = this.top(box) + BOX.height / 2, bend = begin + 9;
    const turn = nodes[box.members[0]].round, branched = turn && turn !== nodes[above.members.at(-1)].round;
    const d = y1 > y0 ? `M${begin} ${y0}H${bend - 6}q6 0 6 6V${y1 - 6}q0 6 6 6H${end}` : `M${begin} ${y0}H${end}`;
    return svg("path", { class: branched ? "edge branched" : "edge", d });
  }

  box(box, turns) {
    const nodes = this.tree.nodes, x = this.left(box), y = this.top(box), last = nodes[box.members.at(-1)];
    const first = oneLine(nodes[box.members[0]].text) || "⏎", more = box.members.length - 1, ending = more ? ` +${more}` : "";
    const room = this.letters - ending.length, letters = [...(box.parent === null ? "prompt" : first)];
    const label = (letters.length > room ? letters.slice(0, room - 1).join("") + "…" : letters.join("")) + ending;
    const rounds = box.members.flatMap((i) => turns.get(i) ?? []);
    const group = svg("g", { class: box.parent === null ? "node prompt" : "node", role: "treeitem", "data-box": box.index, onclick: () => { if (!this.moved) this.pick(box.members.at(-1)); } },
      svg("rect", { x, y, width: this.width, height: BOX.height, rx: 7 }),
      svg("text", { class: "step", x: x + 8, y: y + 15, text: label }));
    if (known(last.value)) group.append(svg("text", { class: "number", x: x + 8, y: y + 29, text: `V ${short(last.value)}` }));
    if (known(last.score)) group.append(svg("text", { class: "number score", x: x + this.width - 7, y: y + 29, text: `J ${short(last.score)}` }));
    if (rounds.length) {
      const text = spans(rounds), w = Math.max(16, 7 * text.length + 8);
      group.append(svg("g", { class: "turn" }, svg("rect", { x: x + this.width - w + 4, y: y - 10, width: w, height: 16, rx: 8 }), svg("text", { x: x + this.width - w / 2 + 4, y: y + 1.8, text })));
    }
    if (last.finish) group.append(outcome(last, x + this.width + 13, y + BOX.height / 2));
    return group;
  }

  /** Colour the boxes: from wrong over neutral to right, by what was chosen. */
  paint() {
    this.layout.boxes.forEach((box, i) => {
      const values = box.members.map((m) => COLOURS[this.colour](this.tree.nodes[m])).filter(known), group = this.boxes[i];
      const value = values.length === 0 ? null : this.colour === "value" ? values.at(-1) : mean(values);
      group.classList.toggle("high", known(value) && value > 0.5);
      group.classList.toggle("low", known(value) && value <= 0.5);
      if (known(value)) group.style.setProperty("--w", `${Math.min(100, 200 * Math.abs(value - 0.5)).toFixed(0)}%`);
    });
  }

  pick(index, tell = true) {
    this.picked = index;
    const path = new Set(pathTo(this.tree.nodes, index)), own = this.layout.boxOf[index];
    this.layout.boxes.forEach((box, i) => {
      const on = path.has(box.members[0]);
      this.boxes[i].classList.toggle("on", on);
      this.boxes[i].classList.toggle("picked", i === own);
      this.boxes[i].setAttribute("aria-selected", i === own);
      this.edges[i]?.classList.toggle("on", on);
    });
    if (tell) this.reveal(this.layout.boxes[own]);
    this.onpick(index, tell);
  }

  reveal(box) {
    const { width, height } = this.node.getBoundingClientRect(), x = this.left(box) * this.scale + this.x, y = this.top(box) * this.scale + this.y;
    const w = (this.width + 24) * this.scale, h = BOX.height * this.scale;
    if (x < 0) this.x -= x - 12; else if (x + w > width) this.x -= x + w - width + 12;
    if (y < 0) this.y -= y - 12; else if (y + h > height) this.y -= y + h - height + 12;
    this.move();
  }

  /** The whole tree, or as much of it as can be read. */
  fit(whole = false) {
    const { width, height } = this.node.getBoundingClientRect(), { rows, columns } = this.layout;
    const w = columns * (this.width + BOX.gap) + 2 * BOX.margin + 8, h = rows * BOX.row + 2 * BOX.margin;
    const all = Math.min(width / w, height / h, 1.25);
    this.scale = whole || all > 0.45 ? all : Math.max(all, Math.min(0.62, width / w * 1.4, 1));
    this.x = Math.max(0, (width - w * this.scale) / 2);
    this.y = Math.max(0, (height - h * this.scale) / 2);
    this.fitted = true;
    this.move();
  }

  zoom(factor, at) {
    const box = this.node.getBoundingClientRect(), x = at ? at.clientX - box.left : box.width / 2, y = at ? at.clientY - box.top : box.height / 2;
    const scale = Math.max(0.04, Math.min(4, this.scale * factor)), ratio = scale / this.scale;
    [this.x, this.y, this.scale, this.fitted] = [x - (x - this.x) * ratio, y - (y - this.y) * ratio, scale, false];
    this.move();
  }

  drag(event) {
    if (event.button !== 0) return;
    const from = { x: event.clientX - this.x, y: event.clientY - this.y, px: event.clientX, py: event.clientY };
    this.moved = false;
    const onmove = (e) => {
      if (Math.hypot(e.clientX - from.px, e.clientY - from.py) > 4) this.moved = true;
      if (!this.moved) return;
      [this.x, this.y, this.fitted] = [e.clientX - from.x, e.clientY - from.y, false];
      this.move();
    };
    addEventListener("pointermove", onmove);
    addEventListener("pointerup", () => removeEventListener("pointermove", onmove), { once: true });
  }

  move() {
    this.world.setAttribute("transform", `translate(${this.x.toFixed(1)} ${this.y.toFixed(1)}) scale(${this.scale.toFixed(4)})`);
    this.node.classList.toggle("far", this.scale < 0.4);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { boxes, boxOf } = this.layout, here = boxes[boxOf[this.picked]], go = (box) => box !== undefined && this.pick(box.members.at(-1));
    const beside = (sign) => boxes.filter((b) => (b.row - here.row) * sign > 0 && b.column <= here.column)
      .sort((a, b) => (a.row - b.row) * sign || b.column - a.column)[0];
    const acts = {
      ArrowLeft: () => here.parent !== null && go(boxes[here.parent]), ArrowRight: () => go(boxes[here.children[0]]),
      ArrowDown: () => go(beside(1)), ArrowUp: () => go(beside(-1)),
      Home: () => this.pick(0), "+": () => this.zoom(1.25), "=": () => this.zoom(1.25), "-": () => this.zoom(0.8),
      f: () => this.fit(true), 0: () => this.fit(),
    };
    if (!acts[event.key]) return;
    event.preventDefault();
    event.stopPropagation();
    acts[event.key]();
  }
}

/** Rounds in few characters: 1–3,5. */
function spans(rounds) {
  const parts = [];
  for (const round of rounds) {
    const last = parts.at(-1);
    if (last && round === last[1] + 1) last[1] = round;
    else parts.push([round, round]);
  }
  return parts.map(([a, b]) => (a === b ? a : `${a}–${b}`)).join(",");
}

/** Right: a disc with a tick; wrong: a square with a cross; cut off: a triangle; in between: a diamond. */
function outcome(leaf, x, y) {
  const { reward, finish } = leaf;
  if (finish === "length") return svg("path", { class: "mark cut", d: `M${x - 7} ${y + 6}L${x} ${y - 8}L${x + 7} ${y + 6}Z` });
  if (!known(reward) || (reward > 0 && reward < 1)) return svg("g", { class: reward > 0.5 ? "mark right" : "mark part" }, svg("path", { d: `M${x} ${y - 8}L${x + 8} ${y}L${x} ${y + 8}L${x - 8} ${y}Z` }));
  if (reward >= 1) return svg("g", { class: "mark right" }, svg("circle", { cx: x, cy: y, r: 8 }), svg("path", { class: "sign", d: `M${x - 3.8} ${y + 0.3}l2.8 2.9l5 -6` }));
  return svg("g", { class: "mark wrong" }, svg("rect", { x: x - 7.5, y: y - 7.5, width: 15, height: 15, rx: 2 }), svg("path", { class: "sign", d: `M${x - 3.2} ${y - 3.2}l6.4 6.4m0 -6.4l-6.4 6.4` }));
}
