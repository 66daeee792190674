// A service worker: the page, its modules and onnxruntime-web come from the cache once they were loaded. Files of a bundle are
// kept by download.js.

const CACHE = "dijiang-page";

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  if (event.request.method === "GET" && new URL(event.request.url).origin === self.location.origin) {
    event.respondWith(answered(event.request));
  }
});

/** The network's answer, which is kept; without a network, the kept one. */
async function answered(request) {
  const cache = await caches.open(CACHE);
  try {
    const response = await fetch(request);
    const ours = new URL(request.url).pathname.includes("/bundle/");
    if (response.ok && !ours) await cache.put(request, response.clone()).catch(() => cache.delete(request));
    return response;
  } catch (error) {
    const kept = await cache.match(request);
    if (kept) return kept;
    throw error;
  }
}
