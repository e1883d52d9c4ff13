// What V8's compilers have to get right: each part prints its name and a digest that is the same on every machine.
// node [V8 OPTIONS] jit.js [SCALE]
'use strict';
const crypto = require('crypto');
const zlib = require('zlib');
const { Worker, isMainThread, workerData, parentPort } = require('worker_threads');
const scale = Number(process.argv[2] || 1);

let state = 12345;
function random() { // xorshift32
  state ^= state << 13; state ^= state >>> 17; state ^= state << 5;
  return state >>> 0;
}
function bytes(count) {
  const out = Buffer.alloc(count);
  for (let i = 0; i < count; i++) out[i] = random();
  return out;
}
const digest = (...values) => {
  const hash = crypto.createHash('sha256');
  for (const value of values) hash.update(ArrayBuffer.isView(value) ? value : String(value)).update('\0');
  return hash.digest('hex').slice(0, 16);
};

if (!isMainThread) {
  const { shared, index, rounds } = workerData;
  const words = new Int32Array(shared);
  let x = index + 1;
  for (let i = 0; i < rounds; i++) {
    Atomics.add(words, 0, 1);
    Atomics.xor(words, 1, x = Math.imul(x, 1664525) + 1013904223 | 0);
    for (;;) { // a slot that counts up by compare-exchange
      const old = Atomics.load(words, 2);
      if (Atomics.compareExchange(words, 2, old, old + index | 0) === old) break;
    }
    if (i % 64 === 0) { // a lock with wait and notify, around memory that isn't atomic
      while (Atomics.compareExchange(words, 3, 0, 1) !== 0) Atomics.wait(words, 3, 1, 1000);
      words[4] = words[4] + 1;
      Atomics.store(words, 3, 0);
      Atomics.notify(words, 3, 1);
    }
  }
  parentPort.postMessage(x);
}

function leb(value) { // signed LEB128
  const out = [];
  for (let v = BigInt(value); ;) {
    const byte = Number(v & 0x7fn);
    v >>= 7n;
    if ((v === 0n && !(byte & 0x40)) || (v === -1n && (byte & 0x40))) return [...out, byte];
    out.push(byte | 0x80);
  }
}

function wasmModule() {
  const i32 = 0x7f, i64 = 0x7e, f64 = 0x7c, v128 = 0x7b;
  const u = (n) => (n < 128 ? [n] : [n & 127 | 128, ...u(n >> 7)]);
  const section = (id, body) => [id, ...u(body.length), ...body];
  const vector = (items) => [...u(items.length), ...items.flat()];
  const get = (n) => [0x20, n], set = (n) => [0x21, n], c32 = (n) => [0x41, ...leb(n)], c64 = (n) => [0x42, ...leb(n)];
  const cf64 = (x) => [0x44, ...new Uint8Array(new Float64Array([x]).buffer)];
  const loop = (counter, body) => [0x03, 0x40, ...body, ...get(counter), ...c32(1), 0x6b, 0x22, counter, 0x0d, 0, 0x0b];
  const code = (locals, body) => {
    const all = [...vector(locals.map(([n, type]) => [...u(n), type])), ...body, 0x0b];
    return [...u(all.length), ...all];
  };
  const lcg = code([[1, i64]], [ // x = x * a + c, rotated and mixed
    ...loop(0, [...get(1), ...c64(6364136223846793005n), 0x7e, ...c64(1442695040888963407n), 0x7c,
      0x22, 1, ...get(1), ...c64(29), 0x8a, 0x85, ...set(1)]), // i64.xor with i64.rotr
    ...get(1)]);
  const logistic = code([[1, f64]], [ // x = 3.99 x (1 - x), and its root
    ...cf64(0.4), ...set(1),
    ...loop(0, [...cf64(3.99), ...get(1), 0xa2, ...cf64(1), ...get(1), 0xa1, 0xa2, ...set(1)]),
    ...get(1), 0x9f]);
  const sieve = code([[2, i32]], [ // composites marked in memory; returns how many numbers below the argument aren't
    ...c32(2), ...set(1),
    0x03, 0x40,
    ...get(1), ...get(1), 0x6c, ...set(2),
    0x02, 0x40, 0x03, 0x40,
    ...get(2), ...get(0), 0x4f, 0x0d, 1,
    ...get(2), ...c32(1), 0x3a, 0, 0,
    ...get(2), ...get(1), 0x6a, ...set(2), 0x0c, 0, 0x0b, 0x0b,
    ...get(1), ...c32(1), 0x6a, 0x22, 1, ...get(1), 0x6c, ...get(0), 0x48, 0x0d, 0, 0x0b,
    ...c32(0), ...set(2), ...c32(2), ...set(1),
    0x03, 0x40,
    ...get(2), ...get(1), 0x2d, 0, 0, 0x45, 0x6a, ...set(2),
    ...get(1), ...c32(1), 0x6a, 0x22, 1, ...get(0), 0x48, 0x0d, 0, 0x0b,
    ...get(2)]);
  const simd = code([[2, v128]], [ // i32x4: a = a * b + b, b = b ^ a shifted
    ...c32(7), 0xfd, 0x11, ...set(1), ...c32(40503), 0xfd, 0x11, ...set(2),
    ...loop(0, [...get(1), ...get(2), 0xfd, ...u(0xb5), ...get(2), 0xfd, ...u(0xae), ...set(1),
      ...get(2), ...get(1), ...c32(5), 0xfd, ...u(0xad), 0xfd, ...u(0x51), ...set(2)]),
    ...get(1), 0xfd, 0x1b, 0, ...get(2), 0xfd, 0x1b, 3, 0x73]);
  const indirect = code([[1, i32]], [ // calls through a table
    ...loop(0, [...get(1), ...get(0), 0x6a, ...get(0), ...c32(1), 0x71, 0x11, 3, 0, ...set(1)]),
    ...get(1)]);
  const triple = code([], [...get(0), ...c32(3), 0x6c]);
  const mix = code([], [...get(0), ...c32(13), 0x77, ...get(0), 0x73]);
  const trap = code([], [...get(0), 0x28, 2, 0]);
  const type = (from, to) => [0x60, ...vector(from.map((t) => [t])), ...vector(to.map((t) => [t]))];
  return new Uint8Array([0, 0x61, 0x73, 0x6d, 1, 0, 0, 0,
    ...section(1, vector([type([i32], [i64]), type([i32], [f64]), type([i32], [i32]), type([i32], [i32])])),
    ...section(3, vector([[0], [1], [2], [2], [2], [3], [3], [2]])),
    ...section(4, vector([[0x70, 0, 2]])),
    ...section(5, vector([[0, 16]])),
    ...section(7, vector([['lcg', 0], ['logistic', 1], ['sieve', 2], ['simd', 3], ['indirect', 4], ['trap', 7]].map(
      ([name, index]) => [...vector([...Buffer.from(name)].map((c) => [c])), 0, index]))),
    ...section(9, vector([[0, ...c32(0), 0x0b, ...vector([[5], [6]])]])),
    ...section(10, vector([lcg, logistic, sieve, simd, indirect, triple, mix, trap]))]);
}

async function workers() {
  const shared = new SharedArrayBuffer(64);
  const rounds = 5000 * scale;
  const ends = await Promise.all([0, 1, 2, 3].map((index) => new Promise((resolve, reject) => {
    const worker = new Worker(__filename, { workerData: { shared, index, rounds } });
    worker.on('message', resolve);
    worker.on('error', reject);
  })));
  return [...ends, ...new Int32Array(shared).slice(0, 5)].join(' ');
}

const parts = {
  integers() {
    let a = 1, b = 7;
    for (let i = 0; i < 5000000 * scale; i++) {
      a = Math.imul(a, 1103515245) + 12345 | 0;
      b = (b >>> 3 ^ b << 5 ^ a) + (i % 7) | 0;
      if (Math.clz32(b) > 3) b = ~b;
      b = (b / 3 | 0) + (a % 1009);
    }
    return digest(a, b);
  },
  floats() {
    let x = 0.4, sum = 0;
    for (let i = 1; i < 2000000 * scale; i++) {
      x = 3.99 * x * (1 - x);
      sum += Math.floor(x * 1e6) - Math.round(x * 10) + Math.trunc(-x * 100) + Math.sqrt(x) + Math.fround(x) + (i % 2.5);
    }
    for (let i = 0; i < 20000; i++) sum += Math.sin(i) + Math.atan2(i, 3) + Math.log1p(i) + Math.exp(-i / 100) + Math.cbrt(i);
    return digest(x, sum, (0.1).toFixed(20), 1e21 + 1, 5e-324, parseFloat('123.456e-7'));
  },
  deoptimizations() { // functions compiled for one kind of argument, then called with others
    function add(a, b) { return a + b; }
    function property(o) { return o.value; }
    const shapes = [(i) => ({ value: i }), (i) => ({ other: 1, value: i * 0.5 }), (i) => ({ value: `${i}`, x: 1 }),
      (i) => Object.assign(Object.create({ value: i }), { y: 2 }), (i) => ({ get value() { return -i; } }), (i) => [i]];
    let out = '';
    for (const [round, shape] of shapes.entries()) {
      let sum = round === 2 ? '' : 0;
      for (let i = 0; i < 30000 * scale; i++) {
        sum = add(sum, property(shape(i)));
        if (typeof sum === 'string' && sum.length > 500) sum = digest(sum);
      }
      out = digest(out, sum);
    }
    let big = 2 ** 30 - 5, wrapped = 0;
    for (let i = 0; i < 200000 * scale; i++) { big = add(big, 1); wrapped = add(wrapped, big) % 9007199254740881; }
    return digest(out, big, wrapped);
  },
  typed_arrays() {
    const buffer = new ArrayBuffer(8192);
    const kinds = [Int8Array, Uint8Array, Uint8ClampedArray, Int16Array, Uint16Array, Int32Array, Uint32Array, Float32Array, Float64Array];
    const view = new DataView(buffer);
    for (let round = 0; round < 20 * scale; round++) {
      for (const Kind of kinds) {
        const array = new Kind(buffer);
        for (let i = 1; i < array.length; i++) {
          const value = array[i - 1] * 1.5 + i - round;
          array[i] = Number.isFinite(value) ? value : i; // a NaN's payload isn't specified
        }
      }
      for (let i = 0; i < 8000; i += 7) view.setInt32(i, view.getUint16(i + 1, i % 2 === 0) * 77 | 0, i % 3 === 0);
      const longs = new BigUint64Array(buffer);
      for (let i = 1; i < longs.length; i++) longs[i] = longs[i] * 31n + longs[i - 1];
    }
    const floats = new Float64Array(3000).map(() => random() / 1e5).sort();
    return digest(new Uint8Array(buffer), floats, new Uint8Array(buffer).subarray(3, 900).copyWithin(5, 1, 77).reverse());
  },
  regexps() {
    const words = [];
    for (let i = 0; i < 30000 * scale; i++) words.push(random().toString(36));
    const text = words.join(' ');
    const patterns = [/\b[a-f]\w+9\b/g, /(\d)(\w)\1\2?/g, /(?<=z)x+|q(?!u)/g, /(?<first>[aeiou])(?:\w*?)\k<first>/g, /[^\w\s]|\u{61}b/gu,
      /^.{20,40}$/gm, /(a|ab)(c|bcd)(d*)/g, /\p{L}\d\p{L}/gu, /(?:x[^y]*y){2}/gs, /K/gi];
    const out = patterns.map((pattern) => {
      let count = 0, at = 0;
      for (const match of text.matchAll(pattern)) { count++; at = at * 31 + match.index + match[0].length | 0; }
      return `${pattern}:${count}:${at}`;
    });
    return digest(...out, text.replace(/(\w)(\w)(\w)/g, (_, a, b, c) => c + a.toUpperCase() + b), text.split(/[aeiou]+/).length);
  },
  bigints() {
    let a = 1n, b = 0n, c = 0n;
    for (let i = 1n; i < BigInt(1200 * scale); i++) a = a * (i * i + 1n) % (1n << 4096n) + (a >> 7n);
    for (let i = 0; i < 100000 * scale; i++) {
      b = BigInt.asUintN(64, b * 6364136223846793005n + 1442695040888963407n);
      c = BigInt.asIntN(64, c + (b >> 11n) - (c << 3n) ^ b);
    }
    return digest(a.toString(16), b, c, 7n ** 2000n / 3n ** 1500n, (1n << 3000n) % 998244353n);
  },
  collections() {
    const map = new Map(), set = new Set(), object = {}, weak = new WeakMap();
    let sum = 0;
    for (let i = 0; i < 100000 * scale; i++) {
      const key = random() % 5003;
      map.set(key, (map.get(key) || 0) + i);
      if (i % 3) set.add(`k${key}`); else set.delete(`k${key % 77}`);
      object[`p${key % 300}`] = i;
      if (i % 11 === 0) delete object[`p${i % 300}`];
      const node = { i, next: map };
      weak.set(node, i);
      sum = (sum + weak.get(node)) % 1000003;
    }
    const list = [...map.values()].sort((x, y) => y - x).map((x, i) => x % (i + 2)).filter((x) => x % 2).flatMap((x) => [x, -x]);
    return digest(sum, list.join(), [...set].join(), JSON.stringify(object), JSON.stringify(JSON.parse(JSON.stringify({ list, object }))));
  },
  control() { // generators, exceptions, closures, destructuring, proxies
    function* numbers(n) { try { for (let i = 0; i < n; i++) { if ((yield i * i) === 'stop') return; } } finally { count++; } }
    let count = 0, sum = 0;
    for (let n = 0; n < 400 * scale; n++) for (const v of numbers(n)) { sum = sum * 33 + v | 0; if (v > 50000) break; }
    for (let i = 0; i < 50000 * scale; i++) {
      try { if (i % 3 === 0) throw i % 2 ? new RangeError(`${i}`) : i; sum ^= i; } catch (error) { sum += error instanceof Error ? error.message.length : error; } finally { sum |= 0; }
      const [a, { b, ...rest }, ...more] = [i, { b: 2, c: i, d: 4 }, 5, 6];
      sum = sum + a * b + rest.c + more.length | 0;
    }
    const proxy = new Proxy({}, { get: (_, name) => name.length, has: () => true });
    for (let i = 0; i < 20000 * scale; i++) sum += proxy[`n${i}`] + ('x' in proxy);
    const deep = (n) => (n === 0 ? 0 : 1 + deep(n - 1));
    let overflow = false;
    try { deep(1e7); } catch (error) { overflow = error instanceof RangeError; }
    return digest(sum, count, deep(5000), overflow);
  },
  garbage() {
    let keep = [], sum = 0;
    for (let i = 0; i < 400000 * scale; i++) {
      const node = { i, text: `n${i}`, next: keep[i % 1000] };
      if (node.next) { sum = sum + node.next.text.length + node.next.i | 0; node.next.next = null; }
      keep[i % 1000] = node;
      if (i % 50000 === 0) keep = keep.slice().concat(new Array(100).fill({ i, text: '', next: null }));
    }
    return digest(sum, keep.length, keep.map((node) => node && node.text).join());
  },
  crypto() {
    const data = bytes(100000), key = bytes(32), iv = bytes(16), out = [];
    for (const name of ['md5', 'sha1', 'sha224', 'sha256', 'sha384', 'sha512', 'sha3-256', 'blake2b512', 'blake2s256', 'sm3', 'ripemd160']) {
      out.push(crypto.createHash(name).update(data).digest('hex'), crypto.createHmac(name, key).update(data).digest('hex'));
    }
    for (const [name, keySize, ivSize] of [['aes-128-cbc', 16, 16], ['aes-256-ctr', 32, 16], ['aes-256-gcm', 32, 12], ['aes-128-ccm', 16, 12],
      ['chacha20-poly1305', 32, 12], ['camellia-256-cbc', 32, 16], ['aes-256-ocb', 32, 12], ['aria-128-ctr', 16, 16], ['aes-256-xts', 64, 16]]) {
      const options = /gcm|ccm|poly|ocb/.test(name) ? { authTagLength: 16 } : {};
      const k = Buffer.concat([key, crypto.createHash('sha256').update(key).digest()]).subarray(0, keySize);
      const cipher = crypto.createCipheriv(name, k, iv.subarray(0, ivSize), options);
      const sealed = Buffer.concat([cipher.update(data.subarray(0, 5000)), cipher.final()]);
      const tag = options.authTagLength ? cipher.getAuthTag() : null;
      const decipher = crypto.createDecipheriv(name, k, iv.subarray(0, ivSize), options);
      if (tag) decipher.setAuthTag(tag);
      const opened = name === 'aes-128-ccm' ? decipher.update(sealed) : Buffer.concat([decipher.update(sealed), decipher.final()]);
      out.push(name, digest(sealed), tag && tag.toString('hex'), opened.equals(data.subarray(0, 5000)));
    }
    out.push(crypto.pbkdf2Sync('secret', key, 3000, 48, 'sha512').toString('hex'), crypto.scryptSync('secret', key, 32, { N: 1024 }).toString('hex'));
    out.push(Buffer.from(crypto.hkdfSync('sha256', key, iv, 'info', 42)).toString('hex'));
    for (const curve of ['prime256v1', 'secp384r1', 'secp521r1', 'secp256k1', 'brainpoolP256r1', 'sect283k1']) {
      const ours = crypto.createECDH(curve), theirs = crypto.createECDH(curve);
      ours.setPrivateKey(key.subarray(0, 30));
      theirs.setPrivateKey(data.subarray(0, 30));
      out.push(curve, ours.getPublicKey('hex'), ours.computeSecret(theirs.getPublicKey()).toString('hex'));
    }
    for (const [kind, prefix, size] of [['ed25519', '302e020100300506032b657004220420', 32], ['ed448', '3047020100300506032b6571043b0439', 57]]) {
      const secret = crypto.createPrivateKey({ key: Buffer.concat([Buffer.from(prefix, 'hex'), data.subarray(7, 7 + size)]), format: 'der', type: 'pkcs8' });
      const signature = crypto.sign(null, data, secret);
      out.push(kind, signature.toString('hex'), crypto.verify(null, data, crypto.createPublicKey(secret), signature));
    }
    const dh = crypto.getDiffieHellman('modp14'), pair = crypto.generateKeyPairSync('rsa', { modulusLength: 1024 });
    dh.generateKeys();
    out.push(dh.verifyError, crypto.privateDecrypt(pair.privateKey, crypto.publicEncrypt(pair.publicKey, key)).equals(key));
    out.push(crypto.verify('sha256', data, pair.publicKey, crypto.sign('sha256', data, pair.privateKey)));
    const a = crypto.createDiffieHellman(512), b = crypto.createDiffieHellman(a.getPrime(), a.getGenerator());
    a.generateKeys(); b.generateKeys();
    out.push(a.computeSecret(b.getPublicKey()).equals(b.computeSecret(a.getPublicKey())));
    return digest(...out);
  },
  zlib() {
    const data = Buffer.from(Array.from({ length: 20000 * scale }, () => (random() % 5000).toString(7)).join(' '));
    const packed = [zlib.deflateSync(data, { level: 9 }), zlib.gzipSync(data, { level: 1 }), zlib.brotliCompressSync(data, { params: { [zlib.constants.BROTLI_PARAM_QUALITY]: 5 } })];
    const same = zlib.inflateSync(packed[0]).equals(data) && zlib.gunzipSync(packed[1]).equals(data) && zlib.brotliDecompressSync(packed[2]).equals(data);
    return digest(same, ...packed);
  },
  text() {
    let out = '';
    for (let i = 0; i < 40000 * scale; i++) {
      const s = String.fromCodePoint(random() % 0x2000 + 32, 0x1f300 + random() % 200) + i.toString(random() % 30 + 2).padStart(9, 'ab');
      out += s.normalize('NFD').toUpperCase().slice(1, -1) + encodeURIComponent(s.at(-1)) + Buffer.from(s).toString('base64') + s.localeCompare('m');
      if (out.length > 20000) out = digest(out, Buffer.from(out, 'utf16le'), out.lastIndexOf('A'), out.split('').reverse().join(''));
    }
    return digest(out, new Intl.NumberFormat('de').format(1234567.891), new Date(1e12).toISOString());
  },
  async wasm() {
    const { instance: { exports: wasm } } = await WebAssembly.instantiate(wasmModule());
    let trapped = 0;
    for (let i = 0; i < 300; i++) { // out of bounds: V8 has this done by a guard region and SIGSEGV
      try { wasm.trap(0x7fff0000 + i * 4096); } catch (error) { trapped += error instanceof WebAssembly.RuntimeError; }
    }
    const values = [];
    for (let i = 1; i < 40; i++) values.push(wasm.lcg(i * 1000), wasm.logistic(i * 1000), wasm.simd(i * 1000), wasm.indirect(i * 1000));
    return digest(wasm.lcg(3000000 * scale), wasm.logistic(2000000 * scale), wasm.sieve(1000000), wasm.simd(3000000 * scale), wasm.indirect(2000000 * scale), trapped, ...values);
  },
  workers,
};

async function main() {
  if (typeof WebAssembly === 'undefined') delete parts.wasm; // --jitless
  for (const [name, run] of Object.entries(parts)) console.log(name, await run());
}
if (isMainThread) main();
