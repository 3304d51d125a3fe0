// The page's state is its address: ?q=words&kind=page, or ?near=ID; a picture is kept in memory.

const at = (id) => document.getElementById(id);
const KINDS = { picture: "pictures", page: "pages", video: "videos", text: "texts" };
const STEP = 24; // hits a time
const MOST = 240;

let picture = null; // a File
let hits = [];
let wanted = STEP;
let opened = -1; // which hit is in view
let asking = new AbortController();

const params = () => new URLSearchParams(location.search);
const url = (path, query) => `${path}?${new URLSearchParams(query)}`;

async function answer(path, query, options = {}) {
  const response = await fetch(url(path, query), options);
  if (response.ok) return response.json();
  let said = response.statusText;
  try {
    const { detail } = await response.json();
    said = typeof detail === "string" ? detail : detail.map((each) => each.msg).join("; ");
  } catch { /* no JSON: the status has to do */ }
  throw new Error(said);
}

function element(name, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(name), attributes);
  made.append(...children);
  return made;
}

// -- asking

function go(query) {
  wanted = STEP;
  history.pushState(null, "", url("/", query));
  show();
}

function current() {
  const kind = params().get("kind");
  return kind ? { kind } : {};
}

async function show() {
  const query = params();
  const words = query.get("q") ?? "";
  const near = query.get("near");
  at("words").value = words;
  const chosen = document.querySelector(`#kinds input[value="${CSS.escape(query.get("kind") ?? "")}"]`);
  if (chosen) chosen.checked = true;
  asking.abort();
  asking = new AbortController();
  const { signal } = asking;
  const settings = { ...current(), k: wanted };
  at("status").textContent = "Searching …";
  at("hits").setAttribute("aria-busy", "true");
  const began = performance.now();
  try {
    let of;
    if (near) {
      const item = await answer("/api/item", { id: near }, { signal });
      of = `nearest to ${item.name}`;
      hits = await answer("/api/near", { ...settings, id: near }, { signal });
    } else if (picture) {
      of = "nearest to the picture" + (words ? ` and “${words}”` : "");
      hits = await answer("/api/search", { ...settings, q: words }, { signal, method: "POST", body: picture });
    } else if (words.trim()) {
      of = `nearest to “${words}”`;
      hits = await answer("/api/search", { ...settings, q: words }, { signal });
    } else {
      of = "";
      hits = await answer("/api/first", settings, { signal });
    }
    const took = Math.round(performance.now() - began);
    at("heading").textContent = of ? `The ${hits.length} ${of}` : "What is here";
    document.title = `${words || at("folder").textContent} – btok`;
    at("status").textContent = hits.length ? `${hits.length} shown, ${took} ms` : "Nothing of this kind is here.";
    at("more").hidden = hits.length < wanted || wanted >= MOST;
    draw();
  } catch (error) {
    if (error.name === "AbortError") return;
    hits = [];
    at("heading").textContent = "Nothing to show";
    at("status").textContent = error.message;
    at("more").hidden = true;
    draw();
  }
}

// -- hits

function draw() {
  at("hits").removeAttribute("aria-busy");
  at("hits").replaceChildren(...hits.map(card));
}

function card(hit, place) {
  const button = element("button", { type: "button", className: "hit" });
  button.append(
    hit.kind === "text"
      ? element("span", { className: "excerpt", textContent: hit.excerpt })
      : thumbnail(hit, "small"),
    element("span", { className: "name", textContent: hit.name }),
  );
  if (hit.score !== undefined) {
    const score = element("span", { className: "score", textContent: hit.score.toFixed(3) });
    const bar = element("meter", { min: 0, max: 1, value: Math.max(0, hit.score) });
    bar.setAttribute("aria-hidden", "true"); // the number beside it says the same
    button.append(score, bar);
  }
  button.addEventListener("click", () => view(place));
  return element("li", {}, button);
}

function thumbnail(hit, size) {
  const alt = hit.kind === "video" ? "frames" : "";
  const image = element("img", { alt, loading: size === "small" ? "lazy" : "eager" });
  // a picture of a few pixels is shown as they are
  image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth < 160));
  image.addEventListener("error", () => {
    image.replaceWith(element("span", { className: "excerpt", textContent: "cannot be shown now" }));
  });
  image.src = url("/thumbnail", { id: hit.id, size });
  return image;
}

function move(event) {
  const buttons = [...document.querySelectorAll("#hits .hit")];
  const place = buttons.indexOf(document.activeElement);
  if (place < 0) return;
  const top = buttons[0].offsetTop;
  const columns = Math.max(1, buttons.filter((button) => button.offsetTop === top).length);
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
  const next = buttons[place + (steps[event.key] ?? 0)];
  if (!(event.key in steps) || !next) return;
  event.preventDefault();
  next.focus();
}

// -- one hit

function view(place) {
  opened = place;
  const hit = hits[place];
  at("view-name").textContent = hit.name;
  at("view-score").textContent = hit.score === undefined ? "" : `score ${hit.score.toFixed(3)}, place ${place + 1}`;
  at("open").href = url("/file", { id: hit.id }) + (hit.page ? `#page=${hit.page}` : "");
  at("previous").disabled = place === 0;
  at("next").disabled = place === hits.length - 1;
  const content = at("view-content");
  content.replaceChildren();
  if (hit.kind === "text") {
    const text = element("pre", { tabIndex: 0 });
    content.append(text);
    fetch(url("/text", { id: hit.id })).then(async (response) => {
      text.textContent = response.ok ? await response.text() : (await response.json()).detail;
    });
  } else if (hit.kind === "video") {
    const part = hit.end === undefined ? "" : `#t=${hit.start},${hit.end}`;
    const video = element("video", { controls: true, preload: "metadata", src: url("/file", { id: hit.id }) + part });
    video.setAttribute("aria-label", hit.name);
    // of a format that this browser does not play: its frames
    video.addEventListener("error", () => video.replaceWith(large(hit)), { once: true });
    content.append(video);
  } else {
    content.append(large(hit));
  }
  if (!at("view").open) at("view").showModal();
}

function large(hit) {
  return Object.assign(thumbnail(hit, "large"), { alt: hit.name });
}

// -- a picture to search by

function ask(file) {
  if (!file) return;
  picture = file;
  at("asked").hidden = false;
  at("asked-name").textContent = file.name ?? "a picture";
  URL.revokeObjectURL(at("asked-picture").src);
  at("asked-picture").src = URL.createObjectURL(file);
  go({ ...current(), ...(at("words").value ? { q: at("words").value } : {}) });
}

function forget() {
  picture = null;
  at("picture").value = "";
  at("asked").hidden = true;
}

// -- what people do

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const words = at("words").value;
  go({ ...current(), ...(words ? { q: words } : {}) });
});
at("kinds").addEventListener("change", (event) => {
  const query = params();
  query.delete("kind");
  if (event.target.value) query.set("kind", event.target.value);
  go(query);
});
at("picture").addEventListener("change", (event) => ask(event.target.files[0]));
at("forget").addEventListener("click", () => { forget(); show(); });
at("more").addEventListener("click", () => { wanted = Math.min(2 * wanted, MOST); show(); });
at("close").addEventListener("click", () => at("view").close());
at("previous").addEventListener("click", () => view(opened - 1));
at("next").addEventListener("click", () => view(opened + 1));
at("near").addEventListener("click", () => {
  const { id } = hits[opened];
  at("view").close();
  forget();
  go({ ...current(), near: id });
});
at("view").addEventListener("close", () => {
  at("view-content").replaceChildren(); // a video stops
  document.querySelectorAll("#hits .hit")[opened]?.focus();
});
at("view").addEventListener("click", (event) => { if (event.target === at("view")) at("view").close(); });
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (at("view").open) {
    if (event.target.matches("video, pre")) return; // their own keys
    if (event.key === "ArrowLeft" && opened > 0) view(opened - 1);
    if (event.key === "ArrowRight" && opened < hits.length - 1) view(opened + 1);
  } else if (event.key === "/" && !event.target.matches("input[type=search]")) {
    event.preventDefault();
    at("words").focus();
  } else {
    move(event);
  }
});
document.addEventListener("paste", (event) => ask([...event.clipboardData.files].find((file) => file.type.startsWith("image/"))));
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
}
for (const kind of ["dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    if (kind === "drop") ask(event.dataTransfer.files[0]);
  });
}
addEventListener("popstate", () => { wanted = STEP; if (at("view").open) at("view").close(); show(); });

// -- at the start

const about = await answer("/api/about", {});
at("folder").textContent = about.folder;
at("about").textContent = `${about.items.toLocaleString("en")} items, searched by ${about.model}`;
const there = Object.entries(KINDS).filter(([kind]) => about.kinds[kind]);
for (const [kind, name] of [["", "all"], ...there]) {
  const count = kind ? about.kinds[kind] : about.items;
  at("kinds").append(
    element("label", {}, element("input", { type: "radio", name: "kind", value: kind, checked: !kind }), `${name} ${count.toLocaleString("en")}`),
  );
}
await show();
