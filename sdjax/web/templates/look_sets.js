// Buckets and duplicates of the page that looks at data.
const Sets = (() => {
  const get = (id) => document.getElementById(id);
  const make = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  const ask = async (path, options) => {
    const response = await fetch(path, options);
    if (!response.ok) {
      const answer = await response.json().catch(() => ({}));
      throw new Error(answer.detail ?? `The server answered ${response.status}.`);
    }
    return response.json();
  };

  const address = (set, number, side) => `look/picture?${new URLSearchParams({ set, number, side })}`;
  const image = (set, number, side, alt) => {
    const made = make("img");
    made.loading = "lazy";
    made.decoding = "async";
    made.alt = alt;
    made.src = address(set, number, side);
    return made;
  };

  const table = (head, rows) => {
    const scroll = make("div", "scroll"), made = make("table"), top = make("thead"), body = make("tbody"), line = make("tr");
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", head.join(", "));
    line.append(...head.map((text) => {
      const cell = make("th", "", text);
      cell.scope = "col";
      return cell;
    }));
    top.append(line);
    body.append(...rows.map((cells) => {
      const row = make("tr");
      row.append(...cells.map((content) => {
        const cell = make("td");
        cell.append(content);
        return cell;
      }));
      return row;
    }));
    made.append(top, body);
    scroll.append(made);
    return scroll;
  };

  const bar = (count, most) => {
    const made = make("div", "bar"), part = make("span");
    made.style.width = "8rem";
    part.style.width = `${(100 * count) / most}%`;
    made.append(part);
    return made;
  };

  const buckets = async (set) => {
    const place = get("buckets");
    place.replaceChildren(make("p", "soft", "Reading the sizes of the pictures"));
    try {
      const asked = new URLSearchParams({ set, resolution: get("resolution").value, step: get("step").value });
      const found = await ask(`look/buckets?${asked}`);
      const most = Math.max(1, ...found.rows.map((row) => row.count));
      const rows = found.rows.map((row) => {
        const thumbs = make("div", "thumbs");
        thumbs.append(...row.examples.map((number) => image(set, number, 256, "")));
        return [`${row.width} × ${row.height}`, row.count.toLocaleString("en"), bar(row.count, most), thumbs];
      });
      const said = [`${found.read.toLocaleString("en")} pictures, in the middle ${found.median[1]} × ${found.median[0]}`,
        `the crop takes ${(100 * found.cropped).toFixed(1)} % of their area`,
        `${found.smaller.toLocaleString("en")} have fewer pixels than ${get("resolution").value} squared, and are enlarged`];
      for (const [reason, count] of Object.entries(found.refused)) said.push(`${count.toLocaleString("en")} ${reason}`);
      if (found.limited) said.push("only the first were read");
      place.replaceChildren(make("p", "", `${said.join("; ")}.`), table(["width × height", "pictures", "share", "the first"], rows));
    } catch (error) {
      place.replaceChildren(make("p", "said bad", error.message));
    }
  };

  const pair = (one) => {
    const item = make("li", "card pair");
    [one.name, one.of].forEach((name, i) => {
      const side = make("div"), seen = one.pictures[i];
      side.append(seen ? image(seen.set, seen.number, 256, name) : make("div", "missing", "not in the data shown here"));
      side.append(make("p", "soft", i ? "kept" : one.reason.replaceAll("_", " ")), make("p", "", name));
      item.append(side);
    });
    return item;
  };

  const duplicates = async (set) => {
    const place = get("duplicates");
    place.replaceChildren();
    try {
      const found = await ask(`look/duplicates?${new URLSearchParams({ set })}`);
      if (!found) {
        const words = make("p", "soft");
        words.append("They are found by ", make("code", "", "python -m sdjax.prepare --duplicates=near"),
          "; name its --output as --data, beside this folder, to see them here.");
        return place.replaceChildren(words);
      }
      const counts = Object.entries(found.counts);
      if (!counts.length) return place.replaceChildren(make("p", "", "Nothing was left out."));
      place.append(table(["left out for", "rows"], counts.map(([reason, count]) => [reason.replaceAll("_", " "), count.toLocaleString("en")])));
      if (found.pairs.length) {
        const list = make("ul", "pairs");
        list.append(...found.pairs.map(pair));
        place.append(make("h3", "", `Duplicates: ${found.pairs.length.toLocaleString("en")} shown`), list);
      }
      if (found.others.length) {
        const details = make("details"), summary = make("summary", "", `${found.others.length.toLocaleString("en")} other rows`);
        details.append(summary, table(["name", "reason", "detail"], found.others.map((row) => [row.name, row.reason, row.detail])));
        place.append(details);
      }
    } catch (error) {
      place.replaceChildren(make("p", "said bad", error.message));
    }
  };

  return { get, make, ask, image, address, buckets, duplicates };
})();
