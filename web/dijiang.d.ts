// Types of dijiang.js; what each does stands there.

export type Provider = "webgpu" | "cpu" | "wasm";

export class State {
  readonly fingerprint: string;
  layers: Float32Array[];
  position: number;
  /** The token that was not fed yet. */
  pending: number | null;
  /** A plain object that IndexedDB stores. */
  toObject(): object;
  static from(found: object): State;
}

export interface LoadOptions {
  provider?: Provider;
  threads?: number;
  builds?: string[];
  progress?: (done: number, total: number) => void;
}

export interface GenerateOptions {
  state?: State;
  maxTokens?: number;
  onToken?: (id: number) => void;
  signal?: AbortSignal;
}

export class Model {
  static load(url: string, options?: LoadOptions): Promise<Model>;
  readonly provider: Provider;
  readonly graph: string;
  /** Why what is better does not run it here. */
  readonly failures: string[];
  readonly manifest: Record<string, unknown>;
  newState(): State;
  generate(prompt: string | number[], options?: GenerateOptions): AsyncGenerator<string, void, void>;
  /** Token ids of a text; begins: no text is before it. */
  read(text: string, begins: boolean): number[];
  step(ids: number[], state: State): Promise<number>;
  close(): Promise<void>;
}
