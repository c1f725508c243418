// Runs as the page holds them: metrics by column, the index of trees, trees on demand.

class Run {
  constructor(index, first) {
    this.index = index;
    this.files = first.files;
    this.metrics = { cursor: "" };
    this.trees = [];
    this.treeCursor = "";
    this.loaded = new Map(); // file -> promise of a tree
    this.take(first);
  }

  /** Take in an answer of the server. Returns whether metrics or trees changed. */
  take(answer) {
    for (const key of ["name", "facts", "config", "summary", "budget", "guided"]) if (key in answer) this[key] = answer[key];
    this.age = answer.age;
    const { metrics, trees } = answer;
    if (metrics.reset) Object.assign(this.metrics, { points: new Map(), tokens: new Map(), total: 0, last: 0 });
    this.metrics.cursor = metrics.cursor;
    for (const [name, values] of Object.entries(metrics.values)) {
      if (!this.metrics.points.has(name)) this.metrics.points.set(name, []);
      const points = this.metrics.points.get(name);
      const means = metrics.means?.[name] ?? values;
      values.forEach((value, i) => { if (known(value)) points.push([metrics.steps[i], value, means[i]]); });
    }
    const sampled = metrics.sampled ?? metrics.values.tokens_sampled ?? [];
    metrics.steps.forEach((step, i) => {
      if (known(sampled[i])) this.metrics.total += sampled[i];
      this.metrics.tokens.set(step, this.metrics.total);
      this.metrics.last = Math.max(this.metrics.last, step);
    });
    if (trees.reset) { this.trees = []; this.loaded.clear(); }
    this.treeCursor = trees.cursor;
    for (const row of trees.rows) { row.run = this.index; this.trees.push(row); }
    return { metrics: metrics.reset || metrics.steps.length > 0, trees: trees.reset || trees.rows.length > 0 };
  }

  /** The points of a metric, [x, value, mean]; the mean is another than the value where a long run is thinned. */
  series(name, axis) {
    const points = this.metrics.points.get(name) ?? [];
    return axis === "step" ? points : points.map(([step, ...values]) => [this.metrics.tokens.get(step) ?? 0, ...values]);
  }

  async poll() {
    const query = new URLSearchParams({ metrics: this.metrics.cursor, trees: this.treeCursor });
    const answer = await fetch(`api/run/${this.index}?${query}`);
    if (!answer.ok) throw new Error(`the server says ${answer.status}`);
    return this.take(await answer.json());
  }

  /** The tree in a file; keeps the last ones seen. */
  tree(file) {
    if (!this.loaded.has(file)) {
      const loading = this.files ? unpack(this.files[file]) : fetch(`api/run/${this.index}/tree/${file}`).then((answer) => {
        if (!answer.ok) throw new Error("this tree is no longer kept");
        return answer.json();
      });
      loading.catch(() => this.loaded.delete(file));
      this.loaded.set(file, loading);
      if (this.loaded.size > 40) this.loaded.delete(this.loaded.keys().next().value);
    }
    return this.loaded.get(file);
  }
}

async function unpack(base64) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}
