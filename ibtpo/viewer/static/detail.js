// The step that was picked: its numbers, and the text up to it with log-prob or entropy as heat over the tokens.

const HEAT = { // how strong, 0 to 1
  plain: () => 0,
  "log-prob": (node, i) => Math.min(1, -(node.logprob[i] ?? 0) / 3) ** 0.7,
  entropy: (node, i) => Math.min(1, (node.entropy[i] ?? 0) / 1.5) ** 0.7,
};

class Detail {
  constructor(onpick) {
    Object.assign(this, { onpick, heat: "log-prob" });
    this.node = el("div", { class: "detail", "aria-live": "polite" });
    this.node.addEventListener("pointerover", (event) => this.hover(event));
    this.node.addEventListener("pointerleave", () => tip.hide());
  }

  show(tree, index) {
    Object.assign(this, { tree, index });
    const nodes = tree.nodes, node = nodes[index], path = pathTo(nodes, index), list = el("dl");
    const add = (name, value) => { if (value !== null && value !== undefined && value !== "") list.append(el("div", {}, el("dt", { text: name }), el("dd", { text: value }))); };
    const figure = (value) => (known(value) ? value.toFixed(3).replace("-", "\u2212") : null);
    add("value V", figure(node.value));
    add("IB-Score J", figure(node.score));
    add("η₁", figure(node.eta1));
    add("η₂ = π(s)", figure(node.eta2));
    add("log-prob", node.logprob.length ? figure(node.logprob.reduce((a, b) => a + (b ?? 0), 0)) : null);
    add("entropy", node.entropy.length ? figure(mean(node.entropy)) : null);
    add("tokens", node.pieces.length);
    add("sampled in round", node.round);
    for (const [turn, at, score] of tree.branched ?? []) if (at === index) add(`branched in round ${turn}`, known(score) ? `J ${figure(score)}` : "\u2713");
    add("reward", known(node.reward) ? number(node.reward) : null);
    add("ended by", node.finish);
    const text = el("pre", { class: "mono tokens" });
    for (const i of path) text.append(this.tokens(i, i === index));
    const below = nodes.map((_, i) => i).filter((i) => nodes[i].parent === node.parent && i !== index && node.parent !== null);
    const others = below.length ? el("div", { class: "others" }, el("span", { class: "label", text: "instead of this step:" }),
      ...below.map((i) => el("button", { type: "button", class: "mono", onclick: () => this.onpick(i) }, `${oneLine(nodes[i].text).slice(0, 60) || "⏎"} `, el("small", { text: known(nodes[i].value) ? `V ${short(nodes[i].value)}` : "" })))) : null;
    this.node.replaceChildren(list, text, ...(others ? [others] : []));
    text.lastChild.scrollIntoView?.({ block: "nearest" });
  }

  tokens(i, own) {
    const node = this.tree.nodes[i], sampled = node.logprob.length > 0, span = el("span", { class: own ? "own" : sampled ? "" : "given" });
    node.pieces.forEach((piece, k) => {
      const token = el("bdi", { text: visible(piece), "data-at": `${i} ${k}` });
      const heat = sampled ? HEAT[this.heat](node, k) : 0;
      if (heat > 0.02) { token.className = this.heat === "entropy" ? "heat entropy" : "heat"; token.style.setProperty("--h", `${(100 * heat).toFixed(0)}%`); }
      span.append(token);
    });
    return span;
  }

  hover(event) {
    const at = event.target.dataset?.at;
    if (!at) { tip.hide(); return; }
    const [i, k] = at.split(" ").map(Number), node = this.tree.nodes[i], row = (name, value) => el("div", {}, `${name}  `, el("b", { text: value }));
    const lines = [el("div", { class: "at mono", text: JSON.stringify(visible(node.pieces[k])) })];
    if (node.logprob.length) {
      const lp = node.logprob[k];
      lines.push(row("log-prob", known(lp) ? `${lp.toFixed(3).replace("-", "\u2212")} (${(100 * Math.exp(lp)).toFixed(1)} %)` : "\u2013"), row("entropy", known(node.entropy[k]) ? node.entropy[k].toFixed(3) : "\u2013"));
    }
    tip.show(event.clientX, event.clientY, lines);
  }
}
