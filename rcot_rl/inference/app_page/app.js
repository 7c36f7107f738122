// The page of `rcot app`. Text of the model and of files is only ever set as textContent.
const $ = (id) => document.getElementById(id);
const POLL_MS = 400;
const VERDICTS = { A: "A · accepted", B: "B · refused" };

let setup = null;
let job = null; // id of the query that is shown
let chosen = null; // the user's File
let shown = null; // state of the query when it ended
let timer = null; // plays the masks

function element(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}

async function answer(response) {
  const body = response.status === 204 ? null : await response.json();
  if (!response.ok) throw new Error(body.error);
  return body;
}

function fail(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

function isDemo() {
  return document.querySelector("[name=source]:checked").value === "demo";
}

function showSource() {
  const demo = isDemo();
  $("drop").hidden = demo;
  URL.revokeObjectURL($("preview").src);
  if (demo) $("preview").src = "demo.mp4";
  else if (chosen) $("preview").src = URL.createObjectURL(chosen);
  $("preview").hidden = !demo && !chosen;
  $("file-name").textContent = chosen ? chosen.name : "Choose a video, or drop it here";
}

function choose(file) {
  if (!file) return;
  const most = setup.limits.upload_bytes;
  if (file.size > most) return fail(`${file.name} has more than ${most / 2 ** 20} MiB`);
  fail("");
  chosen = file;
  document.querySelector("[name=source][value=file]").checked = true;
  showSource();
}

// XMLHttpRequest, because fetch does not report the progress of an upload
function upload(parameters, body) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", `api/jobs?${parameters}`);
    request.upload.onprogress = (event) => {
      $("upload").hidden = !event.lengthComputable;
      $("upload").value = event.loaded / event.total;
    };
    request.onload = () => {
      let reply = {};
      try { reply = JSON.parse(request.responseText); } catch { /* the server has stopped */ }
      if (request.status === 201) resolve(reply.id);
      else reject(new Error(reply.error || `the server answered ${request.status}`));
    };
    request.onerror = () => reject(new Error("the app does not answer, or refused the upload"));
    request.send(body);
  });
}

function busy(on) {
  $("run").disabled = on;
  $("cancel").hidden = !on;
  $("progress").hidden = !on;
  $("upload").hidden = true;
  if (on) $("cancel").disabled = false;
}

async function run(event) {
  event.preventDefault();
  fail("");
  if (!isDemo() && !chosen) return fail("choose a video");
  const parameters = new URLSearchParams({
    query: $("query").value, rounds: $("rounds").value, light: $("light").checked ? "1" : "0",
    demo: isDemo() ? "1" : "0", name: isDemo() ? "" : chosen.name,
  });
  busy(true);
  $("cancel").disabled = true;
  $("status").textContent = "uploading the video";
  $("empty").hidden = true;
  $("result").hidden = true;
  showSteps([]);
  try {
    const id = await upload(parameters, isDemo() ? null : chosen);
    history.replaceState(null, "", `#${id}`);
    await follow(id);
  } catch (error) {
    fail(error.message);
    busy(false);
  }
}

async function follow(id) {
  job = id;
  busy(true);
  let state;
  for (;;) {
    state = await answer(await fetch(`api/jobs/${id}`));
    if (job !== id) return;
    const ahead = state.ahead ? ` (${state.ahead} before this one)` : "";
    $("status").textContent = `${state.message}${ahead} · ${state.seconds.toFixed(0)} s`;
    showSteps(state.steps);
    if (!["uploading", "waiting", "running"].includes(state.state)) break;
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
  busy(false);
  if (state.state === "done") showResult(state);
  else fail(state.message);
}

const picture = (kind, t) => `api/jobs/${job}/${kind}/${t}`;
const stepText = (step) => {
  const frame = step.frame === null ? "" : `, frame ${step.frame}`;
  const outcome = step.task === "aks" ? VERDICTS[step.verdict] || "no verdict" : "";
  return `${step.title}${frame}${outcome && ": "}${outcome}`;
};

function showSteps(steps) {
  $("live").hidden = !steps.length;
  $("live-steps").replaceChildren(...steps.map((step) => {
    const item = element("li", stepText(step));
    item.append(element("p", step.thought || step.answer || step.response, "model quiet"));
    return item;
  }));
}

function showResult(state) {
  const result = state.result;
  shown = state;
  $("empty").hidden = $("live").hidden = true;
  $("result").hidden = false;
  $("summary").textContent = result.summary;
  $("notes").textContent = notes(state).join(" · ");
  $("download").href = `api/jobs/${job}/result.zip`;
  $("keyframe-caption").textContent = `frame ${result.keyframe}`;
  $("keyframe").src = picture("overlay", result.keyframe);
  $("description").textContent = result.description || "none";
  showShares(result.shares);
  $("slider").max = state.frames - 1;
  $("slider").value = 0;
  showFrame();
  showVerdicts(state.steps.filter((step) => step.task === "aks"));
  showResponses(state.steps);
  $("result").scrollIntoView({ block: "nearest" });
}

function notes(state) {
  const result = state.result;
  const parts = [state.name, `${state.frames} frames`];
  if (result.shown !== null) parts.push(`the model saw ${result.shown} of them`);
  if (result.missing) parts.push(`${result.missing} frames could not be decoded`);
  parts.push(`masks by ${result.segmenter}`, `${state.seconds.toFixed(1)} s`);
  if (result.faults.length) parts.push(`faults: ${result.faults.join(", ")}`);
  return parts;
}

function showShares(shares) {
  const most = Math.max(...shares, 1e-9);
  $("shares").replaceChildren(...shares.map((share) => {
    const bar = element("i", undefined, share > 0 ? "has" : "");
    bar.style.height = `${100 * share / most}%`;
    return bar;
  }));
}

function showFrame() {
  const t = Number($("slider").value);
  const kind = $("view").value;
  $("frame").src = picture(kind, t);
  const share = (100 * shown.result.shares[t]).toFixed(1);
  $("frame-caption").textContent = `frame ${t} · ${share} %`;
  [...$("shares").children].forEach((bar, i) => bar.classList.toggle("now", i === t));
  for (const next of [t - 1, t + 1, t + 2]) {
    if (next >= 0 && next < shown.frames) new Image().src = picture(kind, next);
  }
}

function play(on) {
  clearInterval(timer);
  timer = null;
  $("play").textContent = on ? "❚❚" : "▶";
  $("play").setAttribute("aria-label", on ? "Pause" : "Play");
  if (!on) return;
  timer = setInterval(() => {
    $("slider").value = (Number($("slider").value) + 1) % shown.frames;
    showFrame();
  }, 1000 / Math.min(shown.result.fps, 15));
}

function showVerdicts(steps) {
  $("no-verdicts").hidden = steps.length > 0;
  $("verdicts").hidden = !steps.length;
  const known = steps.some((step) => step.probability !== null);
  document.querySelector("th.share").hidden = !known;
  $("verdicts").tBodies[0].replaceChildren(...steps.map((step, i) => {
    const row = element("tr");
    const frame = element("td");
    const thumbnail = element("img");
    thumbnail.src = picture("frames", step.frame);
    thumbnail.alt = "";
    thumbnail.addEventListener("load", sharpen);
    frame.append(element("span", `frame ${step.frame}`), thumbnail);
    row.append(element("td", String(i + 1)), frame,
      element("td", VERDICTS[step.verdict] || "no verdict", step.verdict));
    row.cells[0].dataset.label = "Round";
    if (known) {
      const share = step.probability === null ? "" : `${(100 * step.probability).toFixed(0)} %`;
      row.append(element("td", share));
      row.cells[3].dataset.label = "Probability";
    }
    const reasoning = element("td");
    reasoning.append(element("p", step.thought || step.response, "model"));
    row.append(reasoning);
    return row;
  }));
}

function showResponses(steps) {
  $("responses-title").textContent = `All ${steps.length} responses`;
  $("responses").replaceChildren(...steps.flatMap((step) =>
    [element("h3", stepText(step)), element("pre", step.response)]));
}

// small frames, such as the demo's, are enlarged with sharp pixels
function sharpen(event) {
  event.target.classList.toggle("small", event.target.naturalWidth < 300);
}

async function start() {
  setup = await answer(await fetch("api/setup"));
  const limits = setup.limits;
  $("setup").textContent =
    `Policy ${setup.model}, masks by ${setup.segmenter}, on ${setup.device}. ` +
    "Everything stays on this computer." +
    (setup.drawn_only ? " This policy knows drawn shapes only; the option --model names another." : "");
  $("file-limit").textContent =
    `at most ${limits.upload_bytes / 2 ** 20} MiB and ${limits.frames} frames`;
  $("query").maxLength = limits.query_chars;
  $("query").value = setup.demo_query;
  $("rounds").max = limits.rounds;
  $("rounds").value = $("rounds-value").value = setup.rounds;
  $("light-frames").textContent = setup.light_frames;
  const id = location.hash.slice(1);
  if (/^[\w-]+$/.test(id)) {
    $("empty").hidden = true;
    await follow(id);
  }
}

for (const radio of document.querySelectorAll("[name=source]")) {
  radio.addEventListener("change", showSource);
}
$("file").addEventListener("change", () => choose($("file").files[0]));
for (const type of ["dragover", "dragleave", "drop"]) {
  document.body.addEventListener(type, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", type === "dragover");
    if (type === "dragover") $("drop").hidden = false;
    if (type === "drop") choose(event.dataTransfer.files[0]);
  });
}
$("rounds").addEventListener("input", () => { $("rounds-value").value = $("rounds").value; });
$("form").addEventListener("submit", run);
$("cancel").addEventListener("click", () => {
  $("cancel").disabled = true;
  fetch(`api/jobs/${job}/cancel`, { method: "POST" }).catch((error) => fail(error.message));
});
$("slider").addEventListener("input", () => { play(false); showFrame(); });
$("view").addEventListener("change", showFrame);
$("play").addEventListener("click", () => play(timer === null));
for (const id of ["frame", "keyframe"]) $(id).addEventListener("load", sharpen);
start().catch((error) => { busy(false); $("empty").hidden = false; fail(error.message); });
