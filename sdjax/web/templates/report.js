// The script of report.html: draws the curves when they come into view, and turns the galleries.
(() => {
  const [steps, images] = JSON.parse(document.getElementById("content").dataset.seen);

  // Images seen at a step, between the steps that are known, and beyond them at the last rate.
  const imagesAt = (step) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle; else high = middle;
    }
    const part = (step - steps[low]) / (steps[high] - steps[low]);
    return images[low] + part * (images[high] - images[low]);
  };

  Figures.state.imagesAt = imagesAt;

  const figures = [...document.querySelectorAll(".plot-card")].map((card) => {
    const spec = JSON.parse(card.dataset.figure);
    return { spec, card, hidden: new Set(), drawn: false, series: null, log: spec.log };
  });
  const redraw = () => figures.filter((f) => f.drawn).forEach(Figures.draw);
  figures.forEach(Figures.listen);
  figures.forEach(Figures.listenToLog);

  const byPlot = new Map(figures.map((f) => [f.card.querySelector(".plot"), f]));
  const watcher = new IntersectionObserver((entries) => {
    entries.filter((e) => e.isIntersecting).forEach((e) => {
      watcher.unobserve(e.target);
      Figures.draw(byPlot.get(e.target));
    });
  }, { rootMargin: "500px" });
  byPlot.forEach((_, plot) => watcher.observe(plot));
  addEventListener("beforeprint", () => figures.filter((f) => !f.drawn).forEach(Figures.draw));
  Figures.dark.addEventListener("change", redraw);

  document.querySelectorAll("input[name=axis]").forEach((input) => {
    input.addEventListener("change", () => { Figures.state.axis = input.value; redraw(); });
  });
  document.getElementById("smooth")?.addEventListener("change", (event) => {
    Figures.state.smooth = event.target.checked;
    redraw();
  });

  document.querySelectorAll(".gallery").forEach((gallery) => {
    const slider = gallery.querySelector("input[type=range]");
    const pictures = [...gallery.querySelectorAll("figure")];
    const show = (index) => {
      const at = Math.max(0, Math.min(pictures.length - 1, index));
      slider.value = at;
      pictures.forEach((picture, i) => { picture.hidden = i !== at; });
      const step = pictures[at].dataset.step;
      slider.setAttribute("aria-valuetext", "step " + step);
      gallery.querySelector(".which").textContent = "step " + step;
    };
    slider.addEventListener("input", () => show(Number(slider.value)));
    gallery.querySelector(".earlier").addEventListener("click", () => show(Number(slider.value) - 1));
    gallery.querySelector(".later").addEventListener("click", () => show(Number(slider.value) + 1));
    show(pictures.length - 1);
  });
  document.querySelectorAll("button.copy").forEach((button) => {
    button.addEventListener("click", () => {
      const text = document.getElementById(button.dataset.of).textContent;
      const done = () => { button.textContent = "Copied"; };
      navigator.clipboard?.writeText(text).then(done, () => { button.textContent = "Select and copy by hand"; });
    });
  });
})();
