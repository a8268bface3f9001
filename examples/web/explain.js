// A picture explained in the page, by a WebAssembly module and compact weights that fastdtd embed wrote:
//
//     fastdtd embed squeezenet1_1 -o examples/web --target wasm32 --weights compact16 --name net
//     python -m http.server -d examples/web          then open http://localhost:8000
const ALIGNMENT = 64, PAGE = 65536, SHOWN = 5;
const element = (id) => document.getElementById(id);
const status = (text) => { element("status").textContent = text; };

class Network {
  static async load(module, weights) {
    const [{ instance }, content] = await Promise.all([
      WebAssembly.instantiateStreaming(fetch(module)),
      fetch(weights).then((response) => response.arrayBuffer()),
    ]);
    return new Network(instance.exports, new Uint8Array(content));
  }

  constructor(exports, compact) {
    this.exports = exports;
    this.top = Number(exports.__heap_base.value);
    const shape = this.take(12);
    exports.net_input_shape(shape);
    [this.channels, this.height, this.width] = new Int32Array(exports.memory.buffer, shape, 3);
    const size = 4 * this.channels * this.height * this.width;
    this.classes = exports.net_classes();
    this.input = this.take(size);
    this.relevance = this.take(size);
    this.scores = this.take(4 * this.classes);
    this.workspace = this.take(exports.net_workspace_bytes());
    this.weights = this.take(exports.net_weights_bytes());
    const file = this.take(compact.length); // the last: its memory is used again, for pictures
    new Uint8Array(exports.memory.buffer, file, compact.length).set(compact);
    this.check(exports.net_unpack(file, compact.length, this.weights, this.workspace));
    this.top = file;
  }

  /** Memory that stays, aligned; the module itself allocates none. */
  take(bytes) {
    const at = Math.ceil(this.top / ALIGNMENT) * ALIGNMENT;
    this.top = at + bytes;
    const missing = this.top - this.exports.memory.buffer.byteLength;
    if (missing > 0) this.exports.memory.grow(Math.ceil(missing / PAGE));
    return at;
  }

  check(code) {
    if (code !== 0) throw new Error(this.text(this.exports.net_error(code)));
  }

  text(at) {
    const bytes = new Uint8Array(this.exports.memory.buffer, at);
    return new TextDecoder().decode(bytes.slice(0, bytes.indexOf(0)));
  }

  name(index) {
    const at = this.exports.net_class_name(index);
    return at ? this.text(at) : String(index);
  }

  floats(at, count) {
    return new Float32Array(this.exports.memory.buffer, at, count);
  }

  /** The input from a canvas's pixels. */
  preprocess({ data, width, height }) {
    const before = this.top, pixels = this.take(3 * width * height);
    const rgb = new Uint8Array(this.exports.memory.buffer, pixels, 3 * width * height);
    for (let i = 0, j = 0; i < data.length; i += 4) {
      rgb[j++] = data[i]; rgb[j++] = data[i + 1]; rgb[j++] = data[i + 2];
    }
    this.top = before;
    this.check(this.exports.net_preprocess_rgb(pixels, height, width, 3 * width, this.input));
  }

  /** Scores, and the relevance of each pixel, summed over channels. */
  explain(target = -1) {
    this.check(this.exports.net_explain(this.weights, this.input, target, this.scores, this.relevance, 0,
      this.workspace));
    const size = this.height * this.width, relevance = this.floats(this.relevance, this.channels * size);
    const pixels = new Float32Array(size);
    relevance.forEach((value, i) => { pixels[i % size] += value; });
    return { scores: this.floats(this.scores, this.classes).slice(), pixels };
  }
}

function draw(canvas, width, height, colour) {
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let i = 0; i < width * height; i++) image.data.set([...colour(i), 255], 4 * i);
  context.putImageData(image, 0, 0);
}

function show(network, target) {
  const begun = performance.now();
  const { scores, pixels } = network.explain(target);
  const elapsed = performance.now() - begun, most = pixels.reduce((a, b) => Math.max(a, b), 0) || 1;
  draw(element("heatmap"), network.width, network.height, (i) => {
    const pale = 255 - Math.round(255 * Math.max(pixels[i], 0) / most);
    return [255, pale, pale];
  });
  const best = [...scores.keys()].sort((a, b) => scores[b] - scores[a]).slice(0, SHOWN);
  const chosen = target < 0 ? best[0] : target;
  element("scores").replaceChildren(...best.map((index) => {
    const row = document.createElement("tr"), button = document.createElement("button");
    button.textContent = network.name(index);
    button.setAttribute("aria-pressed", String(index === chosen));
    button.style.fontWeight = index === chosen ? "bold" : "";
    button.onclick = () => show(network, index);
    row.insertCell().append(button);
    row.insertCell().textContent = scores[index].toFixed(2);
    return row;
  }));
  const sum = pixels.reduce((a, b) => a + b, 0);
  status(`${network.name(chosen)}: score ${scores[chosen].toFixed(2)}, sum of relevance ${sum.toFixed(2)}, explained in `
    + `${elapsed.toFixed(0)} ms`);
}

async function open(network, file) {
  try {
    const bitmap = await createImageBitmap(file);
    const { width, height } = bitmap, canvas = new OffscreenCanvas(width, height), context = canvas.getContext("2d");
    context.fillStyle = "white"; // behind what is transparent
    context.fillRect(0, 0, width, height);
    context.drawImage(bitmap, 0, 0);
    network.preprocess(context.getImageData(0, 0, width, height));
    const seen = element("picture");
    Object.assign(seen, { width: network.width, height: network.height });
    seen.getContext("2d").drawImage(canvas, 0, 0, network.width, network.height);
    show(network, -1);
  } catch (error) {
    status(`This cannot be explained: ${error.message}`);
  }
}

try {
  const network = await Network.load("net.wasm", "net.weights");
  status("Ready.");
  const drop = element("drop"), file = element("file");
  const over = (event, is) => { event.preventDefault(); drop.classList.toggle("over", is); };
  drop.onclick = () => file.click();
  drop.onkeydown = (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); file.click(); } };
  drop.ondragover = (event) => over(event, true);
  drop.ondragleave = (event) => over(event, false);
  drop.ondrop = (event) => { over(event, false); if (event.dataTransfer.files[0]) open(network, event.dataTransfer.files[0]); };
  file.onchange = () => { if (file.files[0]) open(network, file.files[0]); };
} catch (error) {
  status(`The network cannot be loaded: ${error.message}`);
}
