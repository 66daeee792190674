// A service worker: the page, its modules and onnxruntime-web come from the cache once they were loaded. Files of a bundle are
// kept by download.js. What else lies below its address is none of its business.

const CACHE = "dijiang-page";
/** Of the page, below its address. */
const OURS = /^(|[\w-]+\.(html|js|wasm)|node_modules\/.+)$/;

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  const { scope } = self.registration;
  const [address] = event.request.url.split(/[?#]/);
  if (event.request.method === "GET" && address.startsWith(scope) && OURS.test(address.slice(scope.length))) {
    event.respondWith(answered(event));
  }
});

/** The network's answer, which is kept; without a network, the kept one. */
async function answered(event) {
  const cache = await caches.open(CACHE);
  const { request } = event;
  try {
    const response = await fetch(request);
    if (response.ok && !response.headers.get("Cache-Control")?.includes("no-store")) {
      event.waitUntil(cache.put(request, response.clone()).catch(() => cache.delete(request)));
    }
    return response;
  } catch (error) {
    const kept = await cache.match(request);
    if (kept) return kept;
    throw error;
  }
}
