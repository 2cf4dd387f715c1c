//! Reduction overlaps with backward: the first bucket is on the wire before the last hook fires.

mod common;

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use common::{Mlp, numbers, ranks, watched};
use hvd_torch::{AdamW, DistributedOptimizer, Observer, ParamGroup, Phase};
use tch::Kind;

/// What happened on a rank, in order.
#[derive(Default)]
struct Trace {
    events: Mutex<Vec<String>>,
    changed: Condvar,
}

impl Trace {
    fn record(&self, event: String) {
        self.events.lock().unwrap().push(event);
        self.changed.notify_all();
    }

    /// Waits until `event` has happened; whether it has within half a minute.
    fn wait_for(&self, event: &str) -> bool {
        let events = self.events.lock().unwrap();
        let missing = |events: &mut Vec<String>| !events.iter().any(|other| other == event);
        !self.changed.wait_timeout_while(events, Duration::from_secs(30), missing).unwrap().1.timed_out()
    }

    fn position(&self, event: &str) -> usize {
        let events = self.events.lock().unwrap();
        events.iter().position(|other| other == event).unwrap_or_else(|| panic!("no {event} in {events:?}"))
    }
}

impl Observer for Trace {
    fn event(&self, tensor: &str, phase: Phase) {
        self.record(format!("{phase:?} {tensor}"));
    }
}

#[test]
fn the_first_bucket_is_on_the_wire_before_the_last_hook_fires() {
    watched(|| {
        for size in [2, 3] {
            ranks(size, |world| {
                let trace = Arc::new(Trace::default());
                world.set_observer(Some(trace.clone()));
                let mlp = Mlp::new(Kind::Float);
                let group = ParamGroup { params: mlp.shallow(), lr: 1e-3, weight_decay: 0.0 };
                let adamw = AdamW::new(vec![group], (0.9, 0.95), 1e-8).unwrap();
                let inside = trace.clone();
                // Backward cannot finish before the first bucket travels: without overlap this would time out.
                let on_gradient = move |name: &str| {
                    if name == "first.weight" {
                        assert!(inside.wait_for("Wire optimizer.bucket.0"), "the first bucket waits for backward");
                    }
                    inside.record(format!("gradient {name}"));
                };
                let builder = DistributedOptimizer::builder(adamw).world(world.clone()).bucket_bytes(1);
                let mut optimizer = builder.on_gradient(on_gradient).build().unwrap();
                assert_eq!(optimizer.buckets()[3], ["first.weight"]);
                mlp.loss(&numbers(&[4, 8], Kind::Float, world.rank() as i64)).backward();
                trace.record("backward returned".into());
                optimizer.step().unwrap();

                let order = ["Wire optimizer.bucket.0", "gradient first.weight", "backward returned"];
                let positions = order.map(|event| trace.position(event));
                assert!(positions.is_sorted(), "{positions:?}");
                world.set_observer(None);
            });
        }
    });
}
