// The page talks to the same API as every other client: images come as server-sent events, first the rows that are drawn.
"use strict";

const PARTIAL_IMAGES = 3;
const SMALL = 160; // pixels; below, an image is shown with its pixels as squares
const element = (id) => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};

let models = [];
let key = sessionStorage.getItem("key");
let running = null; // aborts what is being done
let asking = null; // for the key

const named = (id) => models.find((model) => model.id === id);

async function call(path, options = {}) {
  for (;;) {
    const bytes = String.fromCharCode(...new TextEncoder().encode(key)); // a header has no other letters
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${bytes}` } : {}) };
    const answer = await fetch(path, { ...options, headers });
    if (answer.status !== 401) {
      if (answer.ok) return answer;
      const body = await answer.json().catch(() => null);
      throw new Error(body?.error?.message ?? `The server answered ${answer.status}.`);
    }
    await (asking ??= askForKey().finally(() => { asking = null; }));
  }
}

// Once for all requests that need it. Fails when the dialog is closed without a key.
function askForKey() {
  const dialog = element("key-dialog");
  element("key-problem").hidden = !key;
  dialog.returnValue = "";
  return new Promise((resolve, reject) => {
    dialog.addEventListener("close", () => {
      if (!dialog.returnValue) return reject(new Error("This server asks for a key: press Draw to enter it."));
      key = element("key").value;
      sessionStorage.setItem("key", key);
      resolve();
    }, { once: true });
    dialog.showModal();
  });
}

// Events of an answer: blocks of lines that a blank line ends.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const data = text.slice(0, end).split("\n").filter((line) => line.startsWith("data: "));
      if (data.length) yield JSON.parse(data.map((line) => line.slice(6)).join("\n"));
    }
  }
}

function request(model, seed) {
  const asked = { model, prompt: element("prompt").value, n: Number(element("images").value), seed, stream: true };
  asked.size = element("size").value || named(model).size;
  const rows = Math.floor(Number(asked.size.split("x")[1]) / named(model).downsample);
  asked.partial_images = Math.max(0, Math.min(PARTIAL_IMAGES, rows - 1));
  if (element("negative").value) asked.negative_prompt = element("negative").value;
  if (element("guidance").value) asked.guidance_scale = Number(element("guidance").value);
  return asked;
}

function column(asked, titled) {
  const [width, height] = asked.size.split("x").map(Number);
  const pictures = make("div", { className: asked.n === 1 ? "pictures one" : "pictures" });
  const images = Array.from({ length: asked.n }, (_, index) => {
    const image = make("img", { className: "drawing", width, height, alt: "" });
    image.classList.toggle("small", Math.max(width, height) <= SMALL);
    // Something to show before the first row is there: the image's place, empty.
    image.src = `data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' width='${width}' height='${height}'/>`;
    pictures.append(make("figure", {}, image, make("figcaption", {}, `seed ${asked.seed + index}`)));
    return image;
  });
  element("canvas").append(make("div", { className: "column" }, ...(titled ? [make("h3", {}, asked.model)] : []), pictures));
  return images;
}

async function draw(asked, images, signal) {
  const answer = await call("v1/images/generations", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(asked), signal,
  });
  for await (const event of events(answer)) {
    if (event.error) throw new Error(event.error.message);
    const image = images[event.index];
    image.src = `data:image/png;base64,${event.b64_json}`;
    if (event.type !== "image_generation.completed") continue;
    image.alt = asked.prompt + (asked.n > 1 ? `, image ${event.index + 1} of ${asked.n}` : "");
    image.classList.remove("drawing");
    keep(asked, event, image);
  }
}

function keep(asked, event, image) {
  const guidance = asked.guidance_scale ?? named(asked.model).defaults.guidance_scale;
  const name = `${asked.prompt.toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 60) || "image"}-${event.seed}.png`;
  const which = `image ${element("gallery").children.length + 1}, seed ${event.seed}: ${asked.prompt.slice(0, 80)}`;
  const again = make("button", { type: "button", ariaLabel: `Reuse ${which}` }, "Reuse");
  again.addEventListener("click", () => {
    const values = { prompt: asked.prompt, negative: asked.negative_prompt ?? "", model: asked.model, size: asked.size,
      guidance, seed: event.seed, images: 1 };
    for (const [id, value] of Object.entries(values)) element(id).value = value;
    element("prompt").focus();
  });
  const shown = make("img", { src: image.src, alt: asked.prompt, width: image.width, height: image.height });
  shown.className = image.className;
  element("gallery").prepend(make("li", {}, make("figure", {}, shown, make("figcaption", {},
    make("span", { className: "asked" }, asked.prompt),
    ...(asked.negative_prompt ? [make("span", {}, `without: ${asked.negative_prompt}`), make("br")] : []),
    `${asked.model} · seed ${event.seed} · guidance ${guidance} · ${event.size}`,
    make("div", { className: "links" }, make("a", { href: image.src, download: name, ariaLabel: `Download ${which}` }, "Download"), again)))));
  element("drawn").hidden = false;
}

function busy(value) {
  // Neither button takes the focus with it when it goes.
  if (document.activeElement === element("stop")) element("draw").focus();
  element("draw").ariaDisabled = value;
  element("stop").hidden = !value;
  if (value) element("problem").hidden = true;
}

// One thing at a time, until it is done or stopped.
async function run(work) {
  if (running) return;
  running = new AbortController();
  busy(true);
  try {
    await work(running.signal);
  } catch (error) {
    const stopped = error.name === "AbortError";
    element("status").textContent = stopped ? "Stopped" : "";
    running.abort(); // of two columns, the other
    if (!stopped) {
      element("problem").textContent = error.message;
      element("problem").hidden = false;
    }
    document.querySelectorAll(".drawing").forEach((image) => image.classList.remove("drawing"));
  } finally {
    running = null;
    busy(false);
  }
}

async function drawAll(signal) {
  if (!models.length) await load();
  const begun = performance.now();
  const seed = element("seed").value === "" ? crypto.getRandomValues(new Uint32Array(1))[0] >>> 1 : Number(element("seed").value);
  const beside = element("beside").value;
  const asked = [element("model").value, ...(beside ? [beside] : [])].map((model) => request(model, seed));
  element("canvas").replaceChildren();
  element("status").textContent = "Drawing …";
  const columns = asked.map((each) => column(each, asked.length > 1));
  element("now").scrollIntoView({ block: "nearest", behavior: "smooth" });
  await Promise.all(asked.map((each, index) => draw(each, columns[index], signal)));
  element("status").textContent = `Drawn in ${((performance.now() - begun) / 1000).toFixed(1)} s`;
}

function describe() {
  for (const option of element("beside").options) {
    option.disabled = option.value === element("model").value;
    if (option.selected && option.disabled) element("beside").value = "";
  }
  const [model, beside] = [named(element("model").value), named(element("beside").value)];
  if (!model) return;
  const both = (value) => (beside && value(beside) !== value(model) ? `${value(model)} / ${value(beside)}` : String(value(model)));
  element("guidance").placeholder = both((each) => each.defaults.guidance_scale);
  element("size").placeholder = both((each) => each.size);
  element("negative").placeholder = model.defaults.negative_prompt || "none";
  element("sizes").textContent = `What is left empty is the checkpoint's own. Sizes are multiples of ${model.downsample} pixels.`;
}

async function load() {
  models = (await (await call("v1/models")).json()).data;
  for (const id of ["model", "beside"]) {
    element(id).append(...models.map((model) => make("option", { value: model.id }, `${model.id} (${model.engine})`)));
  }
  element("beside").parentElement.hidden = models.length < 2;
  describe();
}

element("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  run(drawAll);
});
element("stop").addEventListener("click", () => running?.abort());
element("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) element("ask").requestSubmit();
});
for (const id of ["model", "beside"]) element(id).addEventListener("change", describe);
run(load);
