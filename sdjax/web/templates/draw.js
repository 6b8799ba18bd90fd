// The page that draws: sends the form, shows steps as they come, and keeps what was drawn.
"use strict";
const facts = JSON.parse(document.getElementById("facts").textContent);
const get = (id) => document.getElementById(id);
const SETTINGS = ["prompt", "negative", "steps", "guidance", "sampler", "width", "height", "count", "seed"];
const weights = facts.loras.map(([name], i) => ({ name, input: get(`lora-${i}`) }));
let running = null;

const read = (file) => new Promise((done, failed) => {
  const reader = new FileReader();
  reader.onload = () => done(reader.result);
  reader.onerror = () => failed(new Error(`${file.name} cannot be read`));
  reader.readAsDataURL(file);
});

async function request() {
  const body = {
    prompt: get("prompt").value, negative_prompt: get("negative").value,
    steps: Number(get("steps").value), cfg_scale: Number(get("guidance").value),
    sampler_name: get("sampler").value, width: Number(get("width").value),
    height: Number(get("height").value), batch_size: Number(get("count").value),
    seed: get("seed").value === "" ? -1 : Number(get("seed").value),
    loras: Object.fromEntries(weights.map(({ name, input }) => [name, Number(input.value)])),
  };
  const [image] = get("image").files, [mask] = get("mask").files;
  if (mask && !image) throw new Error("A mask is for a picture: choose that too.");
  if (image) {
    body.init_images = [await read(image)];
    body.denoising_strength = Number(get("strength").value);
    if (mask) body.mask = await read(mask);
  }
  return body;
}

async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

function showStep(line) {
  const began = get("forming").hidden;
  get("forming").hidden = false;
  get("preview").hidden = !line.preview;
  get("preview").style.aspectRatio = `${get("width").value} / ${get("height").value}`;
  if (began) get("forming").scrollIntoView({ block: "nearest" }); // below the form, on a phone
  if (line.preview) get("preview").src = line.preview;
  get("progress").value = (line.number + line.step / line.steps) / line.count;
  const which = line.count > 1 ? `Picture ${line.number + 1} of ${line.count}: ` : "";
  get("state").textContent = line.waits ? "Waiting for its turn" : `${which}step ${line.step} of ${line.steps}`;
}

const quoted = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;

function command(made) {
  const words = ["python -m sdjax.sample", `--model=${quoted(facts.place)}`, `--prompts=${quoted(made.prompt)}`];
  if (made.negative_prompt) words.push(`--negative_prompt=${quoted(made.negative_prompt)}`);
  for (const expert of facts.experts) words.push(`--expert=${quoted(expert)}`);
  for (const lora of made.lora_options) words.push(`--lora=${quoted(lora)}`);
  if (facts.weighed) words.push("--prompt_syntax=a1111");
  words.push(`--seed=${made.seed}`, `--steps=${made.steps}`, `--sampler=${made.sampler}`,
    `--guidance=${made.guidance}`, `--width=${made.width}`, `--height=${made.height}`);
  if (made.karras) words.push("--karras");
  if (made.begun) words.push("--init_image=FILE", `--strength=${made.strength}`);
  if (made.masked) words.push("--mask_image=FILE");
  return [...words, "--output=out"].join(" ");
}

function button(text, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.className = "button";
  made.textContent = text;
  made.addEventListener("click", () => act(made));
  return made;
}

async function copy(text, from) {
  try {
    await navigator.clipboard.writeText(text);
    from.textContent = "Copied";
  } catch {
    window.prompt("Copy this:", text);
  }
}

function take(made) {
  const values = { prompt: made.prompt, negative: made.negative_prompt, steps: made.steps, guidance: made.guidance,
    sampler: made.sampler, width: made.width, height: made.height, seed: made.seed };
  for (const [id, value] of Object.entries(values)) get(id).value = value;
  for (const { name, input } of weights) input.value = made.loras[name] ?? 0;
  keep();
  get("prompt").focus();
}

function showPicture(made) {
  get("empty").hidden = true;
  const item = document.createElement("li"), figure = document.createElement("figure");
  figure.className = "card";
  const image = document.createElement("img");
  image.src = made.picture;
  image.alt = made.prompt || "A picture without a prompt";
  if (made.width < 200) image.className = "small";
  const caption = document.createElement("figcaption");
  const prompt = document.createElement("p"), about = document.createElement("p"), row = document.createElement("div");
  prompt.textContent = made.prompt;
  about.className = "soft";
  const label = facts.samplers.find(([name]) => name === made.sampler)?.[1] ?? made.sampler;
  const loras = Object.entries(made.loras).map(([name, weight]) => ` · ${name} ${weight}`).join("");
  about.textContent = `Seed ${made.seed} · ${made.steps} steps · ${label} · guidance ${made.guidance} · ${made.width} × ${made.height}${loras}`;
  row.className = "buttons";
  const save = document.createElement("a");
  save.className = "button";
  save.href = made.picture;
  save.download = `${made.seed}.png`;
  save.textContent = "Save";
  row.append(save, button("Use settings", () => take(made)), button("Copy command", (from) => copy(command(made), from)));
  caption.append(prompt, about, row);
  if (facts.rates) caption.append(thumbs(made));
  figure.append(image, caption);
  item.append(figure);
  get("pictures").prepend(item);
}

function thumbs(made) {
  const row = document.createElement("div");
  row.className = "buttons";
  const both = [["Good", 1], ["Bad", -1]].map(([text, rating]) => button(text, async () => {
    if (await rate({ picture: made.name, rating })) {
      for (const each of both) each.setAttribute("aria-pressed", String(each.textContent === text));
    }
  }));
  for (const each of both) each.setAttribute("aria-pressed", "false");
  row.append(...both, comparing(made));
  return row;
}

async function rate(said) {
  try {
    const response = await fetch("rate", {
      method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(said),
    });
    if (!response.ok) throw new Error(await words(response));
    return true;
  } catch (error) {
    get("error").textContent = error.message;
    return false;
  }
}

// "Better than ..." on one picture, then "... this" on another of the same prompt.
const compared = [];
let better = null;

function comparing(made) {
  const own = { made, button: button("", async () => {
    const first = better;
    better = first ? null : made;
    showComparing();
    if (first && first !== made && await rate({ better: first.name, worse: made.name })) {
      own.button.textContent = "Worse: noted";
    }
  }) };
  compared.push(own);
  showComparing();
  return own.button;
}

function showComparing() {
  for (const { made, button } of compared) {
    const other = better && better !== made;
    button.textContent = !better ? "Better than …" : other ? "… this one" : "Better than … (cancel)";
    button.disabled = Boolean(other && (made.prompt !== better.prompt || made.name === better.name));
    button.setAttribute("aria-pressed", String(better === made));
  }
}

async function words(response) {
  try {
    return (await response.json()).detail;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

async function draw() {
  get("error").textContent = "";
  running = new AbortController();
  get("draw").disabled = true;
  get("stop").disabled = false;
  try {
    const response = await fetch("draw", {
      method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(await request()),
      signal: running.signal,
    });
    if (!response.ok) throw new Error(await words(response));
    for await (const line of lines(response)) {
      if (line.error) throw new Error(line.error);
      if (line.picture) showPicture(line); else showStep(line);
    }
  } catch (error) {
    if (error.name !== "AbortError") get("error").textContent = error.message;
  } finally {
    running = null;
    get("draw").disabled = false;
    get("stop").disabled = true;
    get("forming").hidden = true;
    get("preview").removeAttribute("src");
  }
}

// What was typed is there after a reload; pictures are the browser's to save.
function keep() {
  const values = Object.fromEntries(SETTINGS.map((id) => [id, get(id).value]));
  for (const { name, input } of weights) values[`lora ${name}`] = input.value;
  try { localStorage.setItem("sdjax.draw", JSON.stringify(values)); } catch { /* private windows */ }
}

function restore() {
  try {
    const values = JSON.parse(localStorage.getItem("sdjax.draw") ?? "{}");
    for (const id of SETTINGS) if (typeof values[id] === "string" && values[id]) get(id).value = values[id];
    for (const { name, input } of weights) input.value = values[`lora ${name}`] || input.value;
    if (!get("sampler").value) get("sampler").value = facts.sampler;
  } catch { /* of another version */ }
}

restore();
get("form").addEventListener("input", keep);
get("form").addEventListener("submit", (event) => { event.preventDefault(); if (!running) draw(); });
get("stop").addEventListener("click", () => running?.abort());
get("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) get("form").requestSubmit();
});
