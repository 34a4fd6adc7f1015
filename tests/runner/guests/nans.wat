;; Prints the bits of NaNs: 4 bytes of f32, 8 and 8 of f64, 4 of f32, 16 of f32x4. Their operands are in memory, so
;; that no compiler computes them itself.
(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 64) "\01\00\a0\7f")                  ;; a signalling NaN with bits of its own, f32
  (data (i32.const 72) "\01\00\00\00\00\00\f4\7f")      ;; and f64
  (data (i32.const 80) "\00\00\00\00\00\00\f0\bf")      ;; -1
  (func (export "_start")
    (f32.store (i32.const 128) (f32.add (f32.load (i32.const 64)) (f32.const 1)))
    (f64.store (i32.const 132) (f64.div (f64.load (i32.const 96)) (f64.load (i32.const 96))))
    (f64.store (i32.const 140) (f64.sqrt (f64.load (i32.const 80))))
    (f32.store (i32.const 148) (f32.demote_f64 (f64.load (i32.const 72))))
    (v128.store (i32.const 152) (f32x4.mul (v128.load32_splat (i32.const 64)) (f32x4.splat (f32.const 1))))
    (i32.store (i32.const 0) (i32.const 128))
    (i32.store (i32.const 4) (i32.const 40))
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))))
