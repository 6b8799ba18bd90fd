// The plots of the page that watches: cards for what the runs measure, drawn while they are in view.
const Plots = (() => {
  const place = document.getElementById("figures");
  const cards = new Map(); // "heading|title" -> figure
  const sections = new Map(); // heading -> {section, grid}
  let plans = [], runs = [], due = false;

  const make = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  // A Gaussian mean that looks both ways, as the report's; its deviation is a hundredth of the curve.
  const smoothed = (xs, ys) => {
    const kept = ys.map((y, i) => i).filter((i) => Number.isFinite(ys[i]));
    if (kept.length < 16) return null;
    const width = Math.max(1, kept.length / 100), reach = Math.ceil(4 * width);
    const weights = Array.from({ length: reach + 1 }, (_, k) => Math.exp(-0.5 * (k / width) ** 2));
    const last = kept.length - 1;
    const y = kept.map((_, i) => {
      let sum = 0, total = 0;
      for (let k = -reach; k <= reach; k++) {
        const at = kept[Math.min(last, Math.max(0, i + k))];
        sum += weights[Math.abs(k)] * ys[at];
        total += weights[Math.abs(k)];
      }
      return sum / total;
    });
    return { x: kept.map((i) => xs[i]), y };
  };

  const front = (curve) => {
    if (curve.thinned) return curve.sx ? { x: curve.sx, y: curve.sy } : null;
    if (curve.smooth?.version !== curve.version) curve.smooth = { version: curve.version, made: smoothed(curve.x, curve.y) };
    return curve.smooth.made;
  };

  const seriesOf = (plan) => runs.flatMap((run) =>
    Object.entries(plan.names).flatMap(([metric, label], i) => {
      const curve = run.curves.get(metric);
      if (!curve?.x.length) return [];
      const smooth = plan.noisy.includes(metric) ? front(curve) : null;
      const several = runs.length > 1;
      return [{
        name: several ? `${run.name}: ${label}` : label, run,
        tint: several ? run.tint : undefined, dashes: several ? i : undefined,
        x: curve.x.slice(), y: curve.y.slice(), sx: smooth?.x.slice(), sy: smooth?.y.slice(),
      }];
    }));

  // Images seen at a step of a run, between the lines that say so, and beyond them at its mean rate.
  Figures.state.imagesAt = (step, series) => {
    const seen = series.run.curves.get("train/images_seen");
    if (!seen?.x.length) return step;
    let low = 0, high = seen.x.length - 1;
    if (step <= seen.x[0]) return (step / seen.x[0]) * seen.y[0];
    if (step >= seen.x[high]) return (step / seen.x[high]) * seen.y[high];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (seen.x[middle] <= step) low = middle; else high = middle;
    }
    const part = (step - seen.x[low]) / (seen.x[high] - seen.x[low]);
    return seen.y[low] + part * (seen.y[high] - seen.y[low]);
  };

  const logarithmic = (series) => {
    const values = series.flatMap((s) => s.y).filter(Number.isFinite);
    const low = values.reduce((a, b) => Math.min(a, b), Infinity), high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    return low > 0 && high > 100 * low;
  };

  const words = (figure) => {
    const parts = figure.series.slice(0, 4).map((s) => `${s.name}: ${Number(s.y.at(-1)).toPrecision(4)} at step ${s.x.at(-1)}`);
    return `Line plot of ${figure.plan.title} over training steps, ${figure.series.length} curve(s). ${parts.join(". ")}.`;
  };

  const legend = (figure) => {
    const names = figure.series.map((s) => s.name);
    if (names.join("\n") === figure.names?.join("\n")) return;
    const off = new Set([...figure.hidden].map((i) => figure.names[i]));
    figure.names = names;
    figure.hidden.clear();
    figure.card.querySelector(".legend").replaceChildren(...names.map((name, i) => {
      const button = make("button");
      button.type = "button";
      if (off.has(name)) figure.hidden.add(i);
      button.setAttribute("aria-pressed", String(!off.has(name)));
      const stroke = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      stroke.setAttribute("width", "20");
      stroke.setAttribute("height", "8");
      stroke.setAttribute("aria-hidden", "true");
      const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
      for (const [key, value] of Object.entries({ x1: 0, y1: 4, x2: 20, y2: 4, "stroke-width": 3 })) line.setAttribute(key, value);
      stroke.append(line);
      button.append(stroke, name);
      return button;
    }));
    Figures.listen(figure);
  };

  const refresh = (figure) => {
    figure.stale = false;
    figure.series = seriesOf(figure.plan);
    figure.spec.series = figure.series;
    figure.card.hidden = !figure.series.length;
    if (!figure.series.length) return;
    const log = figure.card.querySelector(".log");
    const positive = figure.series.every((s) => s.y.every((y) => !(y <= 0)));
    log.hidden = !positive;
    if (!positive) figure.log = false;
    else if (!figure.chosen && !figure.drawn) figure.log = logarithmic(figure.series);
    log.setAttribute("aria-pressed", String(figure.log));
    legend(figure);
    figure.card.querySelector(".plot").setAttribute("aria-label", words(figure));
    Figures.draw(figure);
  };

  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const figure = cards.get(entry.target.dataset.key);
      if (!figure) continue;
      figure.seen = entry.isIntersecting;
      if (figure.seen && figure.stale) refresh(figure);
    }
  }, { rootMargin: "400px" });

  const card = (plan, key) => {
    const made = make("section", "card plot-card"), head = make("div", "plot-head"), log = make("button", "log", "log");
    made.dataset.key = key;
    log.type = "button";
    log.setAttribute("aria-label", `log axis: ${plan.title}`);
    head.append(make("h4", "", plan.title), log);
    const plot = make("div", "plot"), names = make("div", "legend");
    plot.setAttribute("role", "figure");
    plot.setAttribute("aria-label", plan.title);
    names.setAttribute("role", "group");
    names.setAttribute("aria-label", "curves to show");
    made.append(head, ...(plan.note ? [make("p", "note", plan.note)] : []), plot, names);
    const figure = { key, plan, card: made, spec: { over: "step", unit: plan.unit, mode: "lines", series: [] },
      series: [], hidden: new Set(), drawn: false, log: false, stale: true, seen: false };
    log.addEventListener("click", () => { figure.chosen = true; });
    Figures.listenToLog(figure);
    return figure;
  };

  // The cards of these plans, in their order; those that are there already stay.
  const arrange = () => {
    const keep = new Set();
    for (const plan of plans) {
      const key = `${plan.heading}|${plan.title}`;
      keep.add(key);
      if (!sections.has(plan.heading)) {
        const section = make("div"), grid = make("div", "grid");
        section.append(make("h3", "", plan.heading), grid);
        sections.set(plan.heading, { section, grid });
      }
      const { section, grid } = sections.get(plan.heading);
      if (section.parentNode !== place) place.append(section);
      let figure = cards.get(key);
      if (!figure) {
        figure = card(plan, key);
        cards.set(key, figure);
        grid.append(figure.card);
        watcher.observe(figure.card);
      }
      figure.plan = plan;
    }
    for (const [key, figure] of cards) {
      if (keep.has(key)) continue;
      watcher.unobserve(figure.card);
      figure.card.remove();
      cards.delete(key);
    }
    const order = [...new Set(plans.map((plan) => plan.heading))];
    for (const heading of order) place.append(sections.get(heading).section);
    for (const [heading, { section }] of sections) if (!order.includes(heading)) section.remove();
  };

  const paint = () => {
    due = false;
    for (const figure of cards.values()) {
      figure.stale = true;
      const any = seriesThere(figure.plan);
      figure.card.hidden = !any;
      if (figure.seen && any) refresh(figure);
    }
    for (const { section, grid } of sections.values()) {
      section.hidden = [...grid.children].every((each) => each.hidden);
    }
    document.getElementById("no-curves").hidden = [...cards.values()].some((figure) => !figure.card.hidden);
  };
  const seriesThere = (plan) => runs.some((run) => Object.keys(plan.names).some((metric) => run.curves.get(metric)?.x.length));

  // Everything is drawn again at most twice a second, however fast rows come.
  const later = () => {
    if (due) return;
    due = true;
    setTimeout(paint, 500);
  };

  Figures.dark.addEventListener("change", later);
  for (const input of document.querySelectorAll("input[name=axis]")) {
    input.addEventListener("change", () => { Figures.state.axis = input.value; paint(); });
  }
  document.getElementById("smooth").addEventListener("change", (event) => {
    Figures.state.smooth = event.target.checked;
    paint();
  });

  return {
    make, later,
    plan: (given) => { plans = given; arrange(); later(); },
    show: (given) => { runs = given; later(); },
  };
})();
