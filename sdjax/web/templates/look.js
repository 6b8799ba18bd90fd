// The page that looks at data: pages of pictures, a filter, and captions that are mended.
"use strict";
(() => {
  const { get, make, ask, image, address } = Sets;
  const facts = JSON.parse(get("facts").textContent);
  let first = 0, total = 0, shown = null, turn = 0;
  const set = () => get("set").value;

  const item = (one) => {
    const made = make("li"), button = make("button", one.mended ? "mended" : "");
    button.type = "button";
    button.append(image(set(), one.number, 256, one.caption ? "" : one.name), // the words say it already
      make("span", one.caption ? "words" : "words none", one.caption || "no caption"));
    button.addEventListener("click", () => open(one, button));
    made.append(button);
    return made;
  };

  const show = async () => {
    const own = ++turn;
    get("said").className = "said";
    get("said").textContent = "Reading";
    try {
      const asked = new URLSearchParams({ set: set(), split: get("split").value, words: get("words").value, from: first });
      const found = await ask(`look/items?${asked}`);
      if (own !== turn) return; // a later one was asked for meanwhile
      total = found.total;
      splits(found.splits);
      get("items").replaceChildren(...found.items.map(item));
      const last = first + found.items.length, number = (count) => count.toLocaleString("en");
      get("where").textContent = total ? `${number(first + 1)} to ${number(last)} of ${number(total)}` : "";
      get("before").disabled = first === 0;
      get("after").disabled = last >= total;
      get("after").parentNode.hidden = total <= facts.page;
      const kept = total < found.all ? `${number(total)} of ${number(found.all)} pictures` : `${number(total)} pictures`;
      const mended = found.count ? `, ${number(found.count)} with a mended caption` : "";
      get("said").textContent = `${kept}${mended}. ${found.notes.join("; ")}`;
    } catch (error) {
      if (own !== turn) return;
      get("items").replaceChildren();
      get("said").className = "said bad";
      get("said").textContent = error.message;
    }
  };

  const splits = (found) => {
    const names = Object.keys(found), before = get("split").value;
    get("split").replaceChildren(...["", ...names].map((name) => {
      const option = make("option", "", name ? `${name} (${found[name].toLocaleString("en")})` : "all");
      option.value = name;
      return option;
    }));
    get("split").value = names.includes(before) ? before : "";
  };

  const open = (one, button) => {
    shown = { one, button };
    get("large-name").textContent = one.name;
    get("large-image").src = address(set(), one.number, 1024);
    get("large-image").alt = one.caption || one.name;
    get("caption").value = one.caption;
    get("mended").textContent = "";
    get("large").showModal();
    get("caption").focus();
  };

  const save = async () => {
    const { one, button } = shown, said = get("mended");
    said.className = "said";
    said.textContent = "Saving";
    try {
      const found = await ask("look/caption", {
        method: "POST", headers: { "content-type": "application/json" },
        body: JSON.stringify({ set: set(), number: one.number, caption: get("caption").value, before: one.caption }),
      });
      one.caption = found.caption;
      one.mended = found.mended;
      get("caption").value = found.caption;
      button.className = found.mended ? "mended" : "";
      const words = button.querySelector(".words");
      words.textContent = found.caption || "no caption";
      words.className = found.caption ? "words" : "words none";
      said.textContent = found.mended ? `Saved; ${found.count} mended so far.` : "Saved; it is that of the data again.";
    } catch (error) {
      said.className = "said bad";
      said.textContent = error.message;
    }
  };

  const another = () => {
    first = 0;
    show();
    get("buckets").replaceChildren();
    Sets.duplicates(set());
  };
  get("filter").addEventListener("submit", (event) => { event.preventDefault(); first = 0; show(); });
  get("set").addEventListener("change", another);
  get("split").addEventListener("change", () => { first = 0; show(); });
  const turned = (by) => { first = Math.max(0, first + by); show(); get("found").scrollIntoView(); };
  get("before").addEventListener("click", () => turned(-facts.page));
  get("after").addEventListener("click", () => turned(facts.page));
  get("bucket-form").addEventListener("submit", (event) => { event.preventDefault(); Sets.buckets(set()); });
  get("mend").addEventListener("submit", (event) => { event.preventDefault(); if (facts.mends) save(); });
  get("large").addEventListener("close", () => shown?.button.focus());
  another();
})();
