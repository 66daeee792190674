// States in IndexedDB: what a page was writing is there when it comes back.

function opened() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("dijiang", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("states");
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function inStore(mode, work) {
  const database = await opened();
  return new Promise((resolve, reject) => {
    const transaction = database.transaction("states", mode);
    const request = work(transaction.objectStore("states"));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = () => reject(transaction.error);
  });
}

/** Keep a plain object under a name if the `stamp` of what is there is `seen`: another tab has not changed it. Whether it was kept. */
export async function save(name, value, seen) {
  const found = await inStore("readwrite", (store) => {
    const request = store.get(name);
    request.onsuccess = () => request.result?.stamp === seen && store.put(value, name);
    return request;
  });
  return found?.stamp === seen;
}

/** What was kept under a name; undefined: nothing. */
export const load = (name) => inStore("readonly", (store) => store.get(name));
/** Forget it. */
export const remove = (name) => inStore("readwrite", (store) => store.delete(name));
