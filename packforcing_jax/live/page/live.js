// The page of `packforcing serve`: shows one session as it is made, and steers it.
"use strict";

const $ = (id) => document.getElementById(id);
const QUEUE = 2; // blocks that wait to be shown; older ones give way
const STRIP = 24; // past blocks in the strip
const LINES = 40; // receipts that stay on the page
const RETRY = 1500; // milliseconds before a lost connection is tried again

const state = {
  token: sessionStorage.getItem("token") || "",
  facts: null, // of the model
  id: null, socket: null, hello: null, closing: false,
  queue: [], showing: null, // blocks of decoded frames
  coming: null, // what was said of the block whose images come next
  refs: 0, asked: new Map(), // prompts by ref
  paused: false, arrivals: [], next: 0, drifted: 0, seconds: 0,
};
// What tests and the curious may read.
window.shown = { blocks: [], frames: 0, dropped: 0, errors: [] };

// HTTP

async function ask(method, path, body) {
  const headers = state.token ? { authorization: `Bearer ${state.token}` } : {};
  const answer = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
  if (answer.status === 401) { $("token-form").hidden = false; throw new Error("this server needs its token"); }
  if (!answer.ok) {
    const said = await answer.json().catch(() => null);
    throw new Error(said ? said.error.message : `the server answered ${answer.status}`);
  }
  return answer;
}
const asJson = async (method, path, body) => (await ask(method, path, body)).json();

function guarded(work) {
  return async (event) => {
    if (event) event.preventDefault();
    try { await work(event); } catch (error) { receipt("error", error.message); }
  };
}

// Receipts

function receipt(kind, text) {
  const line = document.createElement("li");
  line.className = kind;
  line.textContent = text;
  $("receipts").prepend(line);
  while ($("receipts").childElementCount > LINES) $("receipts").lastElementChild.remove();
  if (kind === "error") window.shown.errors.push(text);
}

// The socket

function open(id) {
  leave();
  Object.assign(state, { id, hello: null, queue: [], showing: null, coming: null, arrivals: [], closing: false });
  history.replaceState(null, "", `#${id}`);
  $("strip").replaceChildren();
  $("drift").hidden = true;
  connect();
}

function leave() {
  state.closing = true;
  if (state.socket) state.socket.close();
  state.socket = null;
}

function connect() {
  const id = state.id;
  const protocols = ["packforcing"].concat(state.token ? [`packforcing.${state.token}`] : []);
  const scheme = location.protocol === "https:" ? "wss" : "ws";
  const socket = new WebSocket(`${scheme}://${location.host}/v1/sessions/${id}/live`, protocols);
  socket.binaryType = "arraybuffer";
  state.socket = socket;
  socket.onopen = () => { $("link").textContent = "connected"; };
  socket.onmessage = (event) => {
    if (socket !== state.socket) return;
    if (typeof event.data === "string") heard(JSON.parse(event.data));
    else images(event.data);
  };
  socket.onclose = async (event) => {
    if (socket !== state.socket || state.closing) return;
    $("link").textContent = "not connected";
    enable(false);
    if (event.code === 4401) { $("token-form").hidden = false; return; }
    setTimeout(async () => {
      if (socket !== state.socket || state.closing) return;
      try { await asJson("GET", `/v1/sessions/${id}`); } catch (error) {
        if (error instanceof TypeError) { socket.onclose(event); return; } // the server is away
        receipt("error", error.message);
        return;
      }
      connect();
    }, RETRY);
  };
}

function say(message) {
  if (state.socket && state.socket.readyState === WebSocket.OPEN) state.socket.send(JSON.stringify(message));
}

function wish(message, words) {
  const ref = `p${Date.now().toString(36)}-${state.refs++}`;
  state.asked.set(ref, words);
  say({ ...message, ref });
}

const HEARD = {
  hello(said) {
    state.hello = said;
    setPaused(said.state === "paused");
    state.next = said.block;
    const screen = $("screen");
    screen.width = said.width;
    screen.height = said.height;
    screen.classList.toggle("pixels", said.media === "image/png");
    enable(true);
    refresh();
    fill(said.block);
  },
  block(said) { state.coming = said; },
  received(said) { receipt("received", `received: ${state.asked.get(said.ref) || said.ref}`); },
  applied(said) {
    const words = state.asked.get(said.ref) || said.ref;
    receipt("applied", `applied at block ${said.block}: ${words}`);
    if (words === "pause") setPaused(true);
    if (words === "resume") setPaused(false);
    state.asked.delete(said.ref);
  },
  error(said) { receipt("error", said.message); },
  dropped(said) { window.shown.dropped += said.count; },
  rewound(said) {
    state.queue = [];
    state.next = said.to;
    for (const each of [...$("strip").children]) if (Number(each.dataset.block) >= said.to) each.remove();
    receipt("received", `rewound: block ${said.to} is made next`);
    $("drift").hidden = true;
  },
  drift(said) {
    state.drifted = said.since;
    $("drift-text").textContent = said.message;
    $("drift").hidden = false;
    receipt("error", said.message);
  },
};

function heard(said) {
  const how = HEARD[said.type];
  if (how) how(said);
}

// Blocks

async function decode(buffer, media) {
  const view = new DataView(buffer);
  const frames = [];
  for (let at = 0; at < buffer.byteLength;) {
    const size = view.getUint32(at);
    frames.push(createImageBitmap(new Blob([new Uint8Array(buffer, at + 4, size)], { type: media })));
    at += 4 + size;
  }
  return Promise.all(frames);
}

async function images(buffer) {
  const said = state.coming, id = state.id;
  const frames = await decode(buffer, state.hello.media);
  if (id !== state.id) return;
  state.arrivals.push(performance.now());
  state.arrivals = state.arrivals.slice(-12);
  state.next = said.index + 1;
  state.seconds = said.seconds;
  state.queue.push({ said, frames });
  while (state.queue.length > QUEUE) { const old = state.queue.shift(); window.shown.dropped++; take(old); }
  past(said.index, frames, said.prompt);
  recalled(said);
  $("kept").textContent = `Blocks from ${said.kept} on can be gone back to, and the beginning.`;
  if (!state.showing) requestAnimationFrame(show);
}

const take = (block) => say({ type: "have", block: block.said.index });

function show(now) {
  if (!state.showing) {
    const block = state.queue.shift();
    if (!block) return;
    state.showing = { ...block, began: now, at: -1 };
    $("now").textContent = `Block ${block.said.index}: ${block.said.prompt}`;
    window.shown.blocks = window.shown.blocks.concat(block.said.index).slice(-200);
  }
  const { frames, began, said } = state.showing;
  const at = Math.floor((now - began) / 1000 * state.hello.fps);
  if (at >= frames.length) {
    take(state.showing);
    state.showing = null;
  } else if (at !== state.showing.at) {
    $("screen").getContext("2d").drawImage(frames[at], 0, 0);
    state.showing.at = at;
    window.shown.frames++;
  }
  requestAnimationFrame(show);
}

// The past

async function fill(count) {
  const id = state.id;
  for (let block = Math.max(0, count - STRIP); block < count && id === state.id; block++) {
    try { await fetched(block, block === count - 1); } catch { /* taken back meanwhile */ }
  }
}

async function fetched(block, onScreen) {
  const id = state.id;
  const answer = await ask("GET", `/v1/sessions/${id}/blocks/${block}`);
  const frames = await decode(await answer.arrayBuffer(), state.hello.media);
  if (id !== state.id) return;
  past(block, frames, null);
  if (onScreen && !state.showing) $("screen").getContext("2d").drawImage(frames[frames.length - 1], 0, 0);
}

let told = null;
function past(block, frames, prompt) {
  const strip = $("strip");
  const old = [...strip.children].find((each) => Number(each.dataset.block) === block);
  if (old) old.remove();
  const button = document.createElement("button");
  const canvas = document.createElement("canvas");
  canvas.className = "past" + (state.hello.media === "image/png" ? " pixels" : "");
  canvas.width = state.hello.media === "image/png" ? frames[0].width : 96;
  canvas.height = Math.round(canvas.width * frames[0].height / frames[0].width);
  canvas.getContext("2d").drawImage(frames[0], 0, 0, canvas.width, canvas.height);
  button.type = "button";
  button.dataset.block = block;
  button.title = prompt || `Block ${block}`;
  if (prompt && told !== null && prompt !== told) button.classList.add("new-prompt");
  if (prompt) told = prompt;
  button.append(canvas, String(block));
  button.onclick = guarded(async () => {
    $("at-block").value = block + 1;
    await replay(block);
  });
  const after = [...strip.children].find((each) => Number(each.dataset.block) > block);
  strip.insertBefore(button, after || null);
  while (strip.childElementCount > STRIP) strip.firstElementChild.remove();
  strip.scrollLeft = strip.scrollWidth;
}

async function replay(block) {
  const answer = await ask("GET", `/v1/sessions/${state.id}/blocks/${block}`);
  const frames = await decode(await answer.arrayBuffer(), state.hello.media);
  const began = performance.now();
  $("now").textContent = `Block ${block}, again`;
  const again = (now) => {
    if (state.showing || state.queue.length) return;
    const at = Math.min(frames.length - 1, Math.floor((now - began) / 1000 * state.hello.fps));
    $("screen").getContext("2d").drawImage(frames[Math.max(0, at)], 0, 0);
    if (at < frames.length - 1) requestAnimationFrame(again);
  };
  requestAnimationFrame(again);
}

function recalled(said) {
  const map = $("map"), layers = said.recalled;
  map.width = map.clientWidth || 600;
  map.height = 60;
  const draw = map.getContext("2d");
  const columns = Math.max(16, said.index + 1), wide = map.width / columns, high = map.height / Math.max(1, layers.length);
  layers.forEach((blocks, layer) => {
    draw.fillStyle = "#2b3d48";
    draw.fillRect(0, layer * high, wide * (said.index + 1), high - 1);
    draw.fillStyle = "#e8b04a";
    for (const block of blocks) draw.fillRect(block * wide, layer * high, Math.max(1, wide - 1), high - 1);
  });
}

// Rates

setInterval(() => {
  const times = state.arrivals;
  if (!state.hello || times.length < 2) { $("rates").textContent = ""; return; }
  const period = (times[times.length - 1] - times[0]) / (times.length - 1) / 1000;
  const left = Math.max(0, period - (performance.now() - times[times.length - 1]) / 1000);
  $("rates").textContent = state.paused
    ? `paused before block ${state.next}`
    : `${(1 / period).toFixed(2)} blocks a second, ${state.seconds.toFixed(2)} s to make one; block ${state.next} in ${left.toFixed(1)} s`;
}, 250);

// Controls

function enable(on) {
  for (const id of ["pause", "rewind", "fork", "download", "send"]) $(id).disabled = !on;
}

function setPaused(paused) {
  state.paused = paused;
  $("pause").textContent = paused ? "Resume" : "Pause";
}

const number = (id) => ($(id).value === "" ? null : Number($(id).value));

$("prompt-form").onsubmit = guarded(async () => {
  const text = $("prompt").value.trim(), at = number("prompt-at"), policy = $("policy").value || null;
  wish({ type: "prompt", text, at, policy }, text);
});
$("new-form").onsubmit = guarded(async () => {
  const made = await asJson("POST", "/v1/sessions", {
    prompt: $("prompt").value.trim(), seed: number("seed") || 0, method: $("method").value || null,
    memory: $("memory").value || null, run: $("run").checked,
  });
  told = null;
  open(made.id);
});
$("pause").onclick = guarded(async () => {
  const kind = state.paused ? "resume" : "pause";
  wish({ type: kind }, kind);
});
$("rewind").onclick = guarded(async () => { wish({ type: "rewind", to: number("at-block") || 0 }, "rewind"); });
$("fork").onclick = guarded(async () => {
  const made = await asJson("POST", `/v1/sessions/${state.id}/fork`, { at: number("at-block") || 0 });
  receipt("applied", `forked at block ${made.block} into ${made.id}`);
  open(made.id);
});
$("download").onclick = guarded(async () => {
  const answer = await ask("GET", `/v1/sessions/${state.id}/video.mp4`);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await answer.blob());
  link.download = `${state.id}.mp4`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
});
$("drift-stop").onclick = guarded(async () => { wish({ type: "pause" }, "pause"); $("drift").hidden = true; });
$("drift-back").onclick = guarded(async () => { wish({ type: "rewind", to: state.drifted }, "rewind"); $("drift").hidden = true; });
$("drift-ignore").onclick = () => { $("drift").hidden = true; };
$("token-form").onsubmit = guarded(async () => {
  state.token = $("token").value.trim();
  sessionStorage.setItem("token", state.token);
  $("token-form").hidden = true;
  await begin();
});

async function refresh() {
  const { sessions } = await asJson("GET", "/v1/sessions");
  $("sessions").replaceChildren(...sessions.map((session) => {
    const line = document.createElement("li");
    line.className = session.id === state.id ? "open" : "";
    const go = document.createElement("button");
    go.type = "button";
    go.className = "open-button";
    go.textContent = session.id;
    go.onclick = () => open(session.id);
    const remove = document.createElement("button");
    remove.type = "button";
    remove.textContent = "Delete";
    remove.onclick = guarded(async () => {
      if (session.id === state.id) { leave(); enable(false); state.id = null; }
      await ask("DELETE", `/v1/sessions/${session.id}`);
      await refresh();
    });
    const words = document.createElement("span");
    words.textContent = `${session.state}, block ${session.block}: ${session.prompt}`;
    line.append(go, words, remove);
    return line;
  }));
}

function options(id, names) {
  for (const name of names) $(id).add(new Option(name, name));
  $(id).disabled = names.length === 0;
}

async function begin() {
  if (!state.facts) {
    state.facts = await asJson("GET", "/v1/model");
    $("model").textContent = `${state.facts.model}, ${state.facts.width}x${state.facts.height}, ${state.facts.fps} frames a second`;
    options("policy", state.facts.policies);
    options("method", state.facts.methods);
    options("memory", state.facts.memories);
    if (state.facts.example && !$("prompt").value) $("prompt").value = state.facts.example;
    for (const word of state.facts.vocabulary || []) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = word;
      button.onclick = () => { $("prompt").value = `${$("prompt").value.trim()} ${word}`.trim(); };
      $("words").append(button);
    }
  }
  await refresh();
  const wanted = location.hash.slice(1);
  if (/^[0-9a-f]{16}$/.test(wanted)) open(wanted);
}

setInterval(() => { if (!document.hidden && state.facts) refresh().catch(() => {}); }, 4000);
guarded(begin)();
