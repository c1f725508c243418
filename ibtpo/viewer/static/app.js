// The page: tabs, keys, and asking the server for what is new.

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs.map((first, index) => new Run(index, first));
const tabs = { overview: new Overview(runs, data), curves: new Curves(runs, data), trees: new Trees(runs) };
const names = { overview: "Overview", curves: "Curves", trees: "Trees" };
const controls = chartControls(), status_ = el("span", { class: "status" });
let current = "";

const nav = el("nav", { role: "tablist" }, ...Object.keys(tabs).map((name) => el("a", { href: `#${name}`, role: "tab", text: names[name], "data-tab": name })));
document.getElementById("app").replaceChildren(
  el("header", { class: "top" }, el("div", { class: "names" }, ...runs.map((run, i) => el("b", { class: `runname run${i}`, text: visible(run.name) }))), nav, status_),
  controls, ...Object.values(tabs).map((tab) => tab.node), tip.node);

function open(name) {
  current = name in tabs ? name : "overview";
  for (const [key, tab] of Object.entries(tabs)) tab.node.hidden = key !== current;
  for (const link of nav.children) link.setAttribute("aria-selected", link.dataset.tab === current);
  controls.hidden = current === "trees";
  document.body.dataset.tab = current;
  if (current === "trees") { tabs.trees.table.draw(); tabs.trees.begin(); }
  redraw();
}

function tellStatus(problem) {
  const ages = runs.map((run) => run.age).filter(known), live = data.live && ages.length && Math.min(...ages) < 60 && !problem;
  status_.classList.toggle("live", Boolean(live));
  const steps = runs.map((run) => `step ${run.metrics.last}`).join(" · ");
  status_.textContent = problem ?? (data.live && ages.length ? `${steps} · written ${ago(Math.min(...ages))}` : steps);
}

async function poll() {
  let problem = null;
  try {
    const news = await Promise.all(runs.map((run) => run.poll()));
    if (news.some((n) => n.metrics)) { tabs.overview.refresh(); tabs.curves.refresh(); }
    if (news.some((n) => n.trees)) { tabs.trees.table.refresh(); if (current === "trees") tabs.trees.begin(); }
  } catch (error) {
    problem = "no answer: ibtpo view has ended, or the run folder is gone";
  }
  tellStatus(problem);
  setTimeout(poll, document.hidden ? 10000 : problem ? 4000 : 1500);
}

addEventListener("hashchange", () => open(location.hash.slice(1)));
addEventListener("resize", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
addEventListener("keydown", (event) => {
  if (event.target.matches?.("input")) { if (event.key === "Escape") event.target.blur(); return; }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const at = ["1", "2", "3"].indexOf(event.key);
  if (at >= 0) location.hash = Object.keys(tabs)[at];
  else if (current === "trees" && !event.target.matches?.("a, .list, .list *")) tabs.trees.key(event);
});
open(location.hash.slice(1));
tellStatus(null);
if (data.live) setTimeout(poll, 1000);
