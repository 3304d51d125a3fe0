// The page's state is its address: ?q=words&kind=page, or ?near=ID; a picture that is searched by is
// kept in memory, and an entry of the history says which one.

const at = (id) => document.getElementById(id);
const KINDS = { picture: "pictures", page: "pages", video: "videos", text: "texts" };
const STEP = 24; // hits a time
const MOST = 240;
const SAID = 80; // characters of a query that headings repeat

const pictures = new Map(); // Files
let hits = [];
let wanted = STEP;
let viewed = []; // the hits that the dialog walks through; an answer may replace those below it
let opened = -1; // which of them is in view
let asking = new AbortController();

const params = () => new URLSearchParams(location.search);
const url = (path, query) => `${path}?${new URLSearchParams(query)}`;
const picture = () => pictures.get(history.state?.picture);
const short = (words) => (words.length > SAID ? `${words.slice(0, SAID)}…` : words);

async function answer(path, query, options = {}) {
  const response = await asked(url(path, query), options);
  return response.json();
}

async function asked(address, options = {}) {
  let response;
  try {
    response = await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer; is it still running?");
  }
  if (response.ok) return response;
  let said = response.statusText;
  try {
    said = (await response.json()).detail;
  } catch { /* no JSON: the status has to do */ }
  throw new Error(said);
}

function element(name, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(name), attributes);
  made.append(...children);
  return made;
}

// -- asking

// what is asked for: what is near an item, or words and a picture; among the chosen kind
function go({ near, by = picture() ? history.state.picture : null } = {}) {
  const words = near ? "" : at("words").value;
  const kind = document.querySelector("#kinds input:checked")?.value;
  const query = { ...(words && { q: words }), ...(near && { near }), ...(kind && { kind }) };
  wanted = STEP;
  history.pushState({ picture: near ? null : by }, "", url("/", query));
  fill();
  return show();
}

// what the address says, in the form
function fill() {
  const query = params();
  at("words").value = query.get("q") ?? "";
  const kind = query.get("kind") ?? "";
  for (const each of document.querySelectorAll("#kinds input")) each.checked = each.value === kind;
  const by = picture();
  at("asked").hidden = !by;
  URL.revokeObjectURL(at("asked-picture").src);
  if (by) {
    at("asked-name").textContent = by.name || "a picture";
    at("asked-picture").src = URL.createObjectURL(by);
  } else {
    at("asked-picture").removeAttribute("src");
    at("picture").value = ""; // the same file may be chosen again
  }
}

async function show() {
  const query = params();
  const words = query.get("q") ?? "";
  const near = query.get("near");
  const kind = query.get("kind");
  const by = picture();
  asking.abort();
  asking = new AbortController();
  const { signal } = asking;
  const settings = { ...(kind && { kind }), k: wanted };
  at("status").textContent = "Searching …";
  at("hits").setAttribute("aria-busy", "true");
  const began = performance.now();
  try {
    let of;
    if (near) {
      const item = await answer("/api/item", { id: near }, { signal });
      of = `nearest to ${item.name}`;
      hits = await answer("/api/near", { ...settings, id: near }, { signal });
    } else if (by) {
      of = "nearest to the picture" + (words ? ` and “${short(words)}”` : "");
      hits = await answer("/api/search", { ...settings, q: words }, { signal, method: "POST", body: by });
    } else if (words.trim()) {
      of = `nearest to “${short(words)}”`;
      hits = await answer("/api/search", { ...settings, q: words }, { signal });
    } else {
      of = "";
      hits = await answer("/api/first", settings, { signal });
    }
    const took = Math.round(performance.now() - began);
    at("heading").textContent = of ? `The ${hits.length} ${of}` : "What is here";
    document.title = `${short(words) || at("folder").textContent} – btok`;
    at("status").textContent = hits.length ? `${hits.length} shown, ${took} ms` : "Nothing of this kind is here.";
    if (history.state?.picture && !by) {
      at("status").textContent = "The picture is no longer known after a reload; choose it again.";
    }
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
  // read out: what it is first, and then how a text begins
  const said = [hit.name, hit.kind];
  if (hit.score !== undefined) said.push(`score ${hit.score.toFixed(3)}`);
  button.setAttribute("aria-label", said.join(", "));
  if (hit.excerpt) button.setAttribute("aria-description", hit.excerpt);
  button.append(
    hit.kind === "text"
      ? element("span", { className: "excerpt", textContent: hit.excerpt || "cannot be read now" })
      : thumbnail(hit, "small"),
    element("span", { className: "name", textContent: hit.name }),
  );
  if (hit.score !== undefined) {
    const score = element("span", { className: "score", textContent: hit.score.toFixed(3) });
    const bar = element("meter", { min: 0, max: 1, value: Math.max(0, hit.score) });
    bar.setAttribute("aria-hidden", "true"); // the number beside it says the same
    button.append(score, bar);
  }
  button.addEventListener("click", () => view(place, hits));
  return element("li", {}, button);
}

function thumbnail(hit, size) {
  const image = element("img", { alt: "", loading: size === "small" ? "lazy" : "eager" });
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

function view(place, among = viewed) {
  [viewed, opened] = [among, place];
  const hit = viewed[place];
  at("view-name").textContent = hit.name;
  at("view-score").textContent = hit.score === undefined ? "" : `score ${hit.score.toFixed(3)}, place ${place + 1}`;
  at("open").href = url("/file", { id: hit.id }) + (hit.page ? `#page=${hit.page}` : "");
  at("previous").disabled = place === 0;
  at("next").disabled = place === viewed.length - 1;
  const content = at("view-content");
  content.replaceChildren();
  if (hit.kind === "text") {
    const text = element("pre", { tabIndex: 0 });
    content.append(text);
    asked(url("/text", { id: hit.id }))
      .then((response) => response.text())
      .then((said) => { text.textContent = said; }, (error) => { text.textContent = error.message; });
  } else if (hit.kind === "video") {
    const part = hit.end === undefined ? "" : `#t=${hit.start},${hit.end}`;
    const video = element("video", { controls: true, preload: "metadata", src: url("/file", { id: hit.id }) + part });
    video.setAttribute("aria-label", hit.name);
    // of a format that this browser does not play: its frames
    const unplayed = () => video.replaceWith(large(hit));
    video.addEventListener("error", unplayed, { once: true });
    video.addEventListener("loadedmetadata", () => { if (!video.videoWidth) unplayed(); }); // its sound alone
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
  const by = `${performance.timeOrigin} ${pictures.size}`; // other than any of before a reload
  pictures.set(by, file);
  go({ by });
}

// -- at the start

const about = await answer("/api/about", {}).catch((error) => {
  at("status").textContent = error.message;
  throw error;
});
at("folder").textContent = about.folder;
at("about").textContent = `${about.items.toLocaleString("en")} items, searched by ${about.model}`;
const there = Object.entries(KINDS).filter(([kind]) => about.kinds[kind]);
for (const [kind, name] of [["", "all"], ...there]) {
  const count = kind ? about.kinds[kind] : about.items;
  at("kinds").append(
    element("label", {}, element("input", { type: "radio", name: "kind", value: kind, checked: !kind }), `${name} ${count.toLocaleString("en")}`),
  );
}
at("choose").hidden = !about.pictures; // by a model of text alone

// -- what people do

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  go();
});
at("kinds").addEventListener("change", () => go({ near: at("words").value ? undefined : params().get("near") }));
at("picture").addEventListener("change", (event) => ask(event.target.files[0]));
at("forget").addEventListener("click", () => { go({ by: null }); at("words").focus(); });
at("more").addEventListener("click", async () => {
  const had = hits.length;
  wanted = Math.min(2 * wanted, MOST);
  await show();
  document.querySelectorAll("#hits .hit")[had]?.focus(); // the button is below them, or gone
});
at("close").addEventListener("click", () => at("view").close());
at("previous").addEventListener("click", () => view(opened - 1));
at("next").addEventListener("click", () => view(opened + 1));
at("near").addEventListener("click", async () => {
  const { id } = viewed[opened];
  at("view").close();
  await go({ near: id });
  document.querySelector("#hits .hit")?.focus(); // what had the focus was replaced
});
at("view").addEventListener("close", () => {
  at("view-content").replaceChildren(); // a video stops
  const place = hits.findIndex((hit) => hit.id === viewed[opened].id);
  document.querySelectorAll("#hits .hit")[place]?.focus();
});
at("view").addEventListener("click", (event) => { if (event.target === at("view")) at("view").close(); });
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (at("view").open) {
    if (event.target.matches("video, pre")) return; // their own keys
    if (event.key === "ArrowLeft" && opened > 0) view(opened - 1);
    if (event.key === "ArrowRight" && opened < viewed.length - 1) view(opened + 1);
  } else if (event.key === "/" && !event.target.matches("input[type=search]")) {
    event.preventDefault();
    at("words").focus();
  } else {
    move(event);
  }
});
// a text that is pasted or dropped is the search box's own matter
const files = (transfer) => transfer.types.includes("Files");
if (about.pictures) {
  document.addEventListener("paste", (event) => ask([...event.clipboardData.files].find((file) => file.type.startsWith("image/"))));
}
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    if (!files(event.dataTransfer)) return;
    event.preventDefault();
    if (about.pictures) document.body.classList.add("dropping");
  });
}
for (const kind of ["dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    if (!files(event.dataTransfer)) return;
    event.preventDefault();
    document.body.classList.remove("dropping");
    if (kind === "drop" && about.pictures) ask(event.dataTransfer.files[0]);
  });
}
addEventListener("popstate", () => {
  wanted = STEP;
  if (at("view").open) at("view").close();
  fill();
  show();
});

fill();
await show();
