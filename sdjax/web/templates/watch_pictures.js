// The sliders over the grids of pictures; a picture is asked for when it is shown.
const Pictures = (() => {
  const place = document.getElementById("pictures");
  const sliders = new Map(); // "run|kind" -> slider
  const kept = new Map(); // address -> promise of a picture, the last ones

  const picture = (address) => {
    if (!kept.has(address)) {
      kept.set(address, fetch(address).then(async (response) => {
        if (!response.ok) throw new Error((await response.json()).detail);
        return response.json();
      }));
      kept.get(address).catch(() => kept.delete(address));
      if (kept.size > 60) kept.delete(kept.keys().next().value);
    }
    return kept.get(address);
  };

  const slider = (run, kind, title) => {
    const { make } = Plots;
    const card = make("div", "card gallery"), controls = make("div", "controls");
    const earlier = make("button", "earlier", "←"), range = make("input"), next = make("button", "later", "→");
    const which = make("p", "which soft"), figure = make("figure"), image = make("img");
    const details = make("details"), prompts = make("ol", "prompts");
    for (const [button, label] of [[earlier, "earlier"], [next, "later"]]) {
      button.type = "button";
      button.setAttribute("aria-label", `${label}, ${title}`);
    }
    range.type = "range";
    range.min = 0;
    range.setAttribute("aria-label", `step of the pictures, ${title}`);
    which.setAttribute("aria-live", "polite");
    details.append(make("summary", "", "Prompts"), prompts);
    figure.append(image);
    controls.append(earlier, range, next);
    const heading = make("h3", "", title);
    card.append(heading, controls, which, figure, details);
    const made = { card, controls, heading, steps: [], at: -1, shown: "" };

    const show = async (index) => {
      made.at = Math.max(0, Math.min(made.steps.length - 1, index));
      range.value = made.at;
      const step = made.steps[made.at];
      which.textContent = `step ${step.toLocaleString("en")}`;
      range.setAttribute("aria-valuetext", which.textContent);
      const address = `watch/picture?run=${encodeURIComponent(run.name)}&kind=${encodeURIComponent(kind)}&step=${step}`;
      if (made.shown === address) return;
      made.shown = address;
      try {
        const found = await picture(address);
        if (made.shown !== address) return; // the slider has gone on
        image.src = found.uri;
        image.width = found.width;
        image.height = found.height;
        image.alt = `Grid of pictures at step ${step}, ${title}`;
        const texts = found.prompts.split("\n").filter((text) => text.trim());
        details.hidden = !texts.length;
        prompts.replaceChildren(...texts.map((text) => make("li", "", text)));
      } catch (error) {
        made.shown = "";
        which.textContent = `step ${step}: ${error.message}`;
      }
    };
    range.addEventListener("input", () => show(Number(range.value)));
    earlier.addEventListener("click", () => show(made.at - 1));
    next.addEventListener("click", () => show(made.at + 1));
    // New pictures are shown as they come, unless somebody looks at an earlier one.
    made.update = (steps, newTitle) => {
      const follows = made.at === made.steps.length - 1, step = made.steps[made.at];
      made.steps = steps;
      heading.textContent = newTitle;
      range.max = steps.length - 1;
      controls.hidden = steps.length < 2;
      const stays = steps.indexOf(step);
      show(follows || stays < 0 ? steps.length - 1 : stays);
    };
    return made;
  };

  const show = (runs) => {
    const wanted = new Set();
    for (const run of runs) {
      for (const { kind, title, steps } of run.state?.pictures ?? []) {
        const key = `${run.name}|${kind}`, named = runs.length > 1 ? `${run.name}: ${title}` : title;
        wanted.add(key);
        if (!sliders.has(key)) {
          sliders.set(key, slider(run, kind, named));
          place.append(sliders.get(key).card);
        }
        const one = sliders.get(key);
        if (one.steps.join() !== steps.join() || one.heading.textContent !== named) one.update(steps, named);
      }
    }
    for (const [key, one] of sliders) {
      if (wanted.has(key)) continue;
      one.card.remove();
      sliders.delete(key);
    }
    document.getElementById("no-pictures").hidden = wanted.size > 0;
  };

  return { show };
})();
