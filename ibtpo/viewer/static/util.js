// Small helpers. Text only ever reaches the page as text nodes: nothing here, or anywhere, parses markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element; `props` are attributes, `class`, `text`, or listeners (`onclick`). */
function el(name, props = {}, ...children) {
  return fill(document.createElement(name), props, children);
}

function svg(name, props = {}, ...children) {
  return fill(document.createElementNS(SVG, name), props, children);
}

function fill(node, props, children) {
  for (const [key, value] of Object.entries(props)) {
    if (key.startsWith("aria-")) node.setAttribute(key, value);
    else if (value === undefined || value === null || value === false) continue;
    else if (key === "text") node.textContent = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

/** A text with what cannot be seen, or would turn the text around, made visible: ESC as ␛, bidi marks as ⟨202E⟩. */
function visible(text) {
  return String(text).replace(UNSEEN, (c) => {
    const code = c.charCodeAt(0);
    if (code < 32) return String.fromCharCode(0x2400 + code);
    return code === 127 ? "\u2421" : "\u27e8" + code.toString(16).toUpperCase().padStart(4, "0") + "\u27e9";
  });
}

/** The same on one line. */
function oneLine(text) {
  return visible(String(text).trim().replace(/\s+/g, " "));
}

const known = (value) => typeof value === "number" && Number.isFinite(value);

/** A number for reading: 0.25, 1.2e-5, 12.3k. */
function number(value) {
  if (!known(value)) return "\u2013";
  const size = Math.abs(value);
  let text;
  if (size >= 1e9) text = +(value / 1e9).toPrecision(3) + "G";
  else if (size >= 1e6) text = +(value / 1e6).toPrecision(3) + "M";
  else if (size >= 1e4) text = +(value / 1e3).toPrecision(3) + "k";
  else text = String(+value.toPrecision(3));
  return text.replaceAll("-", "\u2212");
}

/** A value between -10 and 10 in few characters: .67, 1, −.30. */
function short(value) {
  if (!known(value)) return "";
  let text = Math.abs(value).toFixed(2);
  if (text === "0.00") return "0";
  text = text.replace(/\.00$/, "").replace(/^0/, "");
  return (value < 0 ? "\u2212" : "") + text;
}

function ago(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h ago` : `${Math.round(seconds / 86400)} days ago`;
}

/** Two to five buttons of which one is on. */
function choice(label, options, current, onpick) {
  const buttons = options.map(([value, text, title]) => el("button", {
    type: "button", text, title, "aria-pressed": value === current, "data-value": value,
    onclick: () => {
      for (const b of buttons) b.setAttribute("aria-pressed", b.dataset.value === String(value));
      onpick(value);
    },
  }));
  return el("span", { class: "choice", role: "group", "aria-label": label }, el("span", { class: "label", text: label }), ...buttons);
}

/** The one floating tip. */
const tip = {
  node: el("div", { class: "tip", role: "status" }),
  show(x, y, lines) {
    this.node.replaceChildren(...lines);
    this.node.style.display = "block";
    const box = this.node.getBoundingClientRect();
    this.node.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.width - 8)) + "px";
    this.node.style.top = (y + 18 + box.height > innerHeight ? y - box.height - 10 : y + 18) + "px";
  },
  hide() { this.node.style.display = "none"; },
};
