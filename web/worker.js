// A service worker: the page, its modules and onnxruntime-web come from the cache once they were loaded. Files of a bundle are
// kept by download.js.

const CACHE = "dijiang-page";

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  const { origin, pathname } = new URL(event.request.url);
  if (event.request.method === "GET" && origin === self.location.origin && !pathname.includes("/bundle/")) {
    event.respondWith(answered(event.request));
  }
});

/** The network's answer, which is kept; without a network, the kept one. */
async function answered(request) {
  const cache = await caches.open(CACHE);
  try {
    const response = await fetch(request);
    if (response.ok) await cache.put(request, response.clone()).catch(() => cache.delete(request));
    return response;
  } catch (error) {
    const kept = await cache.match(request);
    if (kept) return kept;
    throw error;
  }
}
