;; Tries the network calls of WASI: a TCP socket, a UDP socket, and the lookup of a name. Exits with 0 if both
;; sockets are refused by `access-denied`, and the lookup by `permanent-resolver-failure`.
(component
  (import "wasi:sockets/network@0.2.0" (instance $network
    (export "network" (type (sub resource)))
    (type $code-is (enum "unknown" "access-denied" "not-supported" "invalid-argument" "out-of-memory" "timeout"
      "concurrency-conflict" "not-in-progress" "would-block" "invalid-state" "new-socket-limit" "address-not-bindable"
      "address-in-use" "remote-unreachable" "connection-refused" "connection-reset" "connection-aborted"
      "datagram-too-large" "name-unresolvable" "temporary-resolver-failure" "permanent-resolver-failure"))
    (export "error-code" (type (eq $code-is)))
    (type $family-is (enum "ipv4" "ipv6"))
    (export "ip-address-family" (type (eq $family-is)))))
  (alias export $network "network" (type $network-type))
  (alias export $network "error-code" (type $code-type))
  (alias export $network "ip-address-family" (type $family-type))
  (import "wasi:sockets/instance-network@0.2.0" (instance $instance
    (alias outer 1 $network-type (type $network-outer))
    (export "network" (type $network (eq $network-outer)))
    (export "instance-network" (func (result (own $network))))))
  (import "wasi:sockets/tcp@0.2.0" (instance $tcp (export "tcp-socket" (type (sub resource)))))
  (import "wasi:sockets/udp@0.2.0" (instance $udp (export "udp-socket" (type (sub resource)))))
  (alias export $tcp "tcp-socket" (type $tcp-type))
  (alias export $udp "udp-socket" (type $udp-type))
  (import "wasi:sockets/tcp-create-socket@0.2.0" (instance $create-tcp
    (alias outer 1 $tcp-type (type $tcp-outer)) (export "tcp-socket" (type $socket (eq $tcp-outer)))
    (alias outer 1 $code-type (type $code-outer)) (export "error-code" (type $code (eq $code-outer)))
    (alias outer 1 $family-type (type $family-outer)) (export "ip-address-family" (type $family (eq $family-outer)))
    (export "create-tcp-socket"
      (func (param "address-family" $family) (result (result (own $socket) (error $code)))))))
  (import "wasi:sockets/udp-create-socket@0.2.0" (instance $create-udp
    (alias outer 1 $udp-type (type $udp-outer)) (export "udp-socket" (type $socket (eq $udp-outer)))
    (alias outer 1 $code-type (type $code-outer)) (export "error-code" (type $code (eq $code-outer)))
    (alias outer 1 $family-type (type $family-outer)) (export "ip-address-family" (type $family (eq $family-outer)))
    (export "create-udp-socket"
      (func (param "address-family" $family) (result (result (own $socket) (error $code)))))))
  (import "wasi:sockets/ip-name-lookup@0.2.0" (instance $lookup
    (alias outer 1 $network-type (type $network-outer)) (export "network" (type $network (eq $network-outer)))
    (alias outer 1 $code-type (type $code-outer)) (export "error-code" (type $code (eq $code-outer)))
    (export "resolve-address-stream" (type $stream (sub resource)))
    (export "resolve-addresses" (func (param "network" (borrow $network)) (param "name" string)
      (result (result (own $stream) (error $code)))))))

  (core module $Memory
    (memory (export "memory") 1)
    (data (i32.const 100) "localhost"))
  (core instance $memory (instantiate $Memory))
  (alias core export $memory "memory" (core memory $mem))
  (alias export $instance "instance-network" (func $f0))
  (core func $own-network (canon lower (func $f0)))
  (alias export $create-tcp "create-tcp-socket" (func $f1))
  (core func $new-tcp (canon lower (func $f1) (memory $mem)))
  (alias export $create-udp "create-udp-socket" (func $f2))
  (core func $new-udp (canon lower (func $f2) (memory $mem)))
  (alias export $lookup "resolve-addresses" (func $f3))
  (core func $resolve (canon lower (func $f3) (memory $mem)))

  (core module $Main
    (import "memory" "memory" (memory 1))
    (import "wasi" "own-network" (func $own-network (result i32)))
    (import "wasi" "new-tcp" (func $new-tcp (param i32 i32)))
    (import "wasi" "new-udp" (func $new-udp (param i32 i32)))
    (import "wasi" "resolve" (func $resolve (param i32 i32 i32 i32)))
    ;; result<_, error-code>: at 0 whether it is an error, at 4 the handle or the code
    (func $is-error (param $code i32) (result i32)
      (i32.and
        (i32.eq (i32.load8_u (i32.const 0)) (i32.const 1)) (i32.eq (i32.load8_u (i32.const 4)) (local.get $code))))
    (func (export "run") (result i32) (local $all i32)
      (call $new-tcp (i32.const 0) (i32.const 0))
      (local.set $all (call $is-error (i32.const 1)))
      (call $new-udp (i32.const 1) (i32.const 0))
      (local.set $all (i32.and (local.get $all) (call $is-error (i32.const 1))))
      (call $resolve (call $own-network) (i32.const 100) (i32.const 9) (i32.const 0))
      (i32.eqz (i32.and (local.get $all) (call $is-error (i32.const 20))))))
  (core instance $main (instantiate $Main
    (with "memory" (instance $memory))
    (with "wasi" (instance
      (export "own-network" (func $own-network)) (export "new-tcp" (func $new-tcp))
      (export "new-udp" (func $new-udp)) (export "resolve" (func $resolve))))))
  (alias core export $main "run" (core func $run-core))
  (func $run (result (result)) (canon lift (core func $run-core)))
  (instance $run-interface (export "run" (func $run)))
  (export "wasi:cli/run@0.2.0" (instance $run-interface)))
