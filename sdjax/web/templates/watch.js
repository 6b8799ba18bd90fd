// The page that watches: which runs there are, their events, their numbers, and what one may ask.
(() => {
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const get = (id) => document.getElementById(id);
  const { make } = Plots;
  const runs = new Map(); // name -> {name, tint, curves, state, card, heard}
  let chosen = new Set(), followed = [], source = null, again = 0;

  // ---- events ------------------------------------------------------------------------------

  const whole = (packed) => {
    const curve = { x: Figures.decode(packed.x), y: Figures.decode(packed.y), version: 0 };
    if (packed.sx) Object.assign(curve, { thinned: true, sx: Figures.decode(packed.sx), sy: Figures.decode(packed.sy) });
    return curve;
  };

  // A step that comes again, after the run went back, takes the place of what was there.
  const add = (run, row) => {
    for (const [name, value] of Object.entries(row)) {
      if (name === "step") continue;
      if (!run.curves.has(name)) run.curves.set(name, { x: [], y: [], version: 0 });
      const curve = run.curves.get(name);
      while (curve.x.length && curve.x.at(-1) >= row.step) {
        curve.x.pop();
        curve.y.pop();
      }
      while (curve.sx?.length && curve.sx.at(-1) > row.step) {
        curve.sx.pop();
        curve.sy.pop();
      }
      curve.x.push(row.step);
      curve.y.push(value ?? NaN);
      curve.version += 1;
    }
  };

  const say = (text) => { if (get("connection").textContent !== text) get("connection").textContent = text; };

  const connect = () => {
    source?.close();
    source = null;
    followed = [...chosen].map((name) => runs.get(name)).filter(Boolean);
    Plots.show(followed);
    showNow();
    if (!followed.length) return say("No run is chosen");
    source = new EventSource("watch/events?" + followed.map((run) => `run=${encodeURIComponent(run.name)}`).join("&"));
    const own = source, these = followed;
    const on = (name, act) => own.addEventListener(name, (event) => {
      if (own !== source) return;
      const data = JSON.parse(event.data);
      act(these[data.run], data);
    });
    own.onopen = () => say("Live");
    own.onerror = () => {
      if (own === source) say("The connection is lost; it is tried again"); // by the browser, or by `look`
    };
    on("plans", (_, { plans }) => Plots.plan(plans));
    on("curves", (run, { curves }) => {
      run.curves = new Map(Object.entries(curves).map(([name, packed]) => [name, whole(packed)]));
      run.heard = Date.now();
      Plots.later();
    });
    on("rows", (run, { rows }) => {
      rows.forEach((row) => add(run, row));
      run.heard = Date.now();
      Plots.later();
    });
    on("state", (run, state) => {
      run.state = state;
      run.heard = state.age === null ? null : Date.now() - 1000 * state.age;
      showRun(run);
      Pictures.show(followed);
    });
    on("trouble", (run, { words }) => { run.trouble = words; showRun(run); });
  };

  // ---- what the runs are doing -------------------------------------------------------------

  const ago = (heard) => {
    if (!heard) return "no metrics yet";
    const seconds = Math.max(0, Math.round((Date.now() - heard) / 1000));
    if (seconds < 90) return `last metrics ${seconds} s ago`;
    if (seconds < 5400) return `last metrics ${Math.round(seconds / 60)} min ago`;
    return `last metrics ${Math.round(seconds / 3600)} h ago`;
  };

  const card = (run) => {
    const made = make("article", "card"), head = make("h3"), badge = make("span", "badge");
    const swatch = make("span", "swatch"), doing = make("p", "soft"), bar = make("progress"), tiles = make("dl", "tiles");
    const buttons = make("div", "buttons"), sample = make("button", "", "Sample now"), stop = make("button", "", "Stop and save");
    const said = make("p", "said"), warnings = make("div"), heard = make("p", "soft");
    head.append(swatch, make("span", "", run.name), badge);
    said.setAttribute("role", "status");
    bar.max = 1;
    bar.setAttribute("aria-label", `steps done of ${run.name}`);
    for (const button of [sample, stop]) {
      button.type = "button";
      button.disabled = true;
      button.setAttribute("aria-label", `${button.textContent}: ${run.name}`);
    }
    sample.addEventListener("click", () => ask(run, "sample", "Asked: pictures come after the next step."));
    stop.addEventListener("click", () => {
      if (confirm(`Stop ${run.name}? It saves after its current step; the same command goes on.`)) {
        ask(run, "stop", "Asked: it stops after its current step, and saves.");
      }
    });
    buttons.append(sample, stop, said);
    made.append(head, doing, heard, bar, tiles, buttons, warnings);
    return { made, badge, swatch, doing, bar, tiles, sample, stop, said, warnings, heard };
  };

  const ask = async (run, wish, words) => {
    const { said } = run.card;
    said.className = "said";
    said.textContent = "";
    try {
      const response = await fetch("watch/ask", {
        method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ run: run.name, wish }),
      });
      if (!response.ok) throw new Error((await response.json()).detail);
      said.textContent = words;
    } catch (error) {
      said.className = "said bad";
      said.textContent = error.message;
    }
  };

  const LEVELS = { bad: "Problem", warn: "Warning", note: "Note" };
  const warned = (found) => {
    const list = make("ul", "warnings");
    list.append(...found.map((one) => {
      const item = make("li", one.level);
      item.append(make("b", "", `${LEVELS[one.level] ?? "Note"}: ${one.title}`));
      one.remedy.split("`").forEach((part, i) => item.append(i % 2 ? make("code", "", part) : part));
      return item;
    }));
    return list;
  };

  const showRun = (run) => {
    if (!run.state) return;
    run.card ??= card(run);
    const { state, card: parts } = run;
    parts.swatch.style.background = Figures.colour({ tint: run.tint }, 0);
    parts.swatch.hidden = followed.length < 2;
    parts.badge.textContent = state.active ? "training" : state.total && state.done >= state.total ? "finished" : "not running";
    parts.badge.className = state.active ? "badge active" : "badge";
    parts.doing.textContent = run.trouble ? `${state.doing}. Its files cannot be read: ${run.trouble}` : state.doing;
    parts.doing.hidden = parts.doing.textContent.toLowerCase() === parts.badge.textContent;
    run.trouble = "";
    parts.bar.hidden = !state.total;
    parts.bar.value = state.total ? Math.min(1, state.done / state.total) : 0;
    parts.tiles.replaceChildren(...state.tiles.map(([name, value, small]) => {
      const tile = make("div", "card tile"), shown = make("dd", "", value);
      if (small) shown.append(make("small", "", small));
      tile.append(make("dt", "", name), shown);
      return tile;
    }));
    for (const button of [parts.sample, parts.stop]) button.disabled = !(facts.trusted && state.active);
    if (!facts.trusted && state.active && !parts.said.textContent) parts.said.textContent = "The buttons take a server with a token (--token_file).";
    parts.warnings.replaceChildren(...(state.warnings.length ? [warned(state.warnings)] : []));
    parts.heard.textContent = ago(run.heard);
    if (!parts.made.isConnected) showNow();
  };

  const showNow = () => {
    followed.forEach((run) => { if (run.card) run.card.swatch.hidden = followed.length < 2; });
    get("now").replaceChildren(...followed.filter((run) => run.card).map((run) => run.card.made));
  };
  setInterval(() => followed.forEach((run) => { if (run.card) run.card.heard.textContent = ago(run.heard); }), 1000);

  // ---- which runs there are ----------------------------------------------------------------

  const keep = () => { try { localStorage.setItem("sdjax.watch", JSON.stringify([...chosen])); } catch { /* private windows */ } };
  const kept = () => {
    try {
      const names = JSON.parse(localStorage.getItem("sdjax.watch") ?? "[]");
      return Array.isArray(names) ? names.filter((name) => runs.has(name)) : [];
    } catch {
      return [];
    }
  };

  // At first those that go on, else the newest.
  const first = (list) => {
    const before = kept();
    if (before.length) return before;
    const active = list.filter((run) => run.active).map((run) => run.name);
    if (active.length) return active.slice(0, 4);
    return [...list].sort((a, b) => b.newest - a.newest).slice(0, 1).map((run) => run.name);
  };

  const choice = () => {
    get("choice").hidden = runs.size < 2;
    get("runs").replaceChildren(...[...runs.values()].map((run) => {
      const item = make("li"), label = make("label"), box = make("input"), swatch = make("span", "swatch");
      box.type = "checkbox";
      box.checked = chosen.has(run.name);
      swatch.style.background = Figures.colour({ tint: run.tint }, 0);
      box.addEventListener("change", () => {
        if (box.checked && chosen.size >= facts.most) {
          box.checked = false;
          say(`At most ${facts.most} runs are shown together`);
          return;
        }
        if (box.checked) chosen.add(run.name); else chosen.delete(run.name);
        keep();
        connect();
        Pictures.show(followed);
      });
      label.append(box, swatch, run.active ? `${run.name} (training)` : run.name);
      item.append(label);
      return item;
    }));
  };

  const look = async () => {
    clearTimeout(again);
    try {
      const response = await fetch("watch/runs");
      if (!response.ok) throw new Error((await response.json()).detail);
      const list = await response.json(), names = list.map((run) => run.name), before = runs.size;
      let changed = false;
      for (const { name, active } of list) {
        if (!runs.has(name)) runs.set(name, { name, tint: runs.size, curves: new Map(), state: null });
        changed ||= runs.get(name).active !== active;
        runs.get(name).active = active;
      }
      for (const name of [...runs.keys()]) {
        if (names.includes(name)) continue;
        runs.delete(name);
        changed = chosen.delete(name) || true;
      }
      get("empty").hidden = runs.size > 0;
      get("title").textContent = runs.size === 1 ? names[0] : "Runs";
      document.title = `${get("title").textContent} · sdjax`;
      if (!chosen.size && runs.size && !before) chosen = new Set(first(list));
      if (changed || runs.size !== before) choice();
      const gone = followed.some((run) => !runs.has(run.name));
      if (chosen.size && (!source || source.readyState === EventSource.CLOSED || gone)) connect();
      else if (!runs.size) say("Waiting for a run");
    } catch (error) {
      say(`The server does not answer: ${error.message}`);
    }
    again = setTimeout(look, 5000);
  };
  Figures.dark.addEventListener("change", () => { choice(); followed.forEach(showRun); });
  look();
})();
