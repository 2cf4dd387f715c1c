//! The timeline of a world, read as a viewer reads it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use hvd_core::config::Config;
use hvd_core::{Error, ReduceOp, World};
use serde_json::Value;

/// The events of a file.
fn events(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).expect("the timeline");
    serde_json::from_str(&text).expect("an array of events")
}

/// A slice: its name, and those inside it.
#[derive(Debug)]
struct Slice {
    name: String,
    end: Value,
    inside: Vec<String>,
}

/// The outermost slices of every rank's tensors, in order. Checks that slices nest and that time goes forward.
fn slices(events: &[Value]) -> BTreeMap<(u64, String), Vec<Slice>> {
    let place = |event: &Value| (event["pid"].as_u64().expect("a process"), event["tid"].as_u64().unwrap_or(0));
    let mut names = BTreeMap::new();
    let mut open: BTreeMap<_, Vec<(String, Vec<String>)>> = BTreeMap::new();
    let mut last: BTreeMap<_, f64> = BTreeMap::new();
    let mut slices: BTreeMap<_, Vec<Slice>> = BTreeMap::new();
    for event in events {
        let lane = place(event);
        if let Some(ts) = event["ts"].as_f64().filter(|_| event["ph"] != "i") {
            let before = last.insert(lane, ts).unwrap_or(0.0);
            assert!(ts >= before, "time goes back at {event}");
        }
        match event["ph"].as_str().expect("a phase") {
            "M" if event["name"] == "thread_name" => drop(names.insert(lane, event["args"]["name"].clone())),
            "B" => {
                let name = event["name"].as_str().expect("a name").to_string();
                if let Some((_, inside)) = open.entry(lane).or_default().last_mut() {
                    inside.push(name.clone());
                }
                open.entry(lane).or_default().push((name, Vec::new()));
            }
            "E" => {
                let stack = open.get_mut(&lane).expect("something is open");
                let (name, inside) = stack.pop().expect("something is open");
                if stack.is_empty() {
                    let tensor = names[&lane].as_str().expect("a name").to_string();
                    let slice = Slice { name, inside, end: event["args"].clone() };
                    slices.entry((lane.0, tensor)).or_default().push(slice);
                }
            }
            "M" | "i" => {}
            other => panic!("an event of phase {other}"),
        }
    }
    assert!(open.values().all(Vec::is_empty), "open at the end: {open:?}");
    slices
}

fn stations(operation: &str) -> Vec<String> {
    let negotiate = format!("NEGOTIATE_{operation}");
    [&negotiate, "QUEUE", "COPY_IN", "WIRE_THREAD", "COPY_OUT"].map(str::to_string).to_vec()
}

#[test]
fn a_timeline_has_every_tensor_of_every_rank() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("timeline.json");
    std::fs::write(&path, "what an earlier run left").expect("a file");
    let config = Config { timeline: Some(path.clone()), timeline_mark_rounds: true, ..Config::default() };
    let size = 3;
    for result in World::threads_with(size, &config, |world| {
        for _ in 0..4 {
            let names = (0..5).map(|i| format!("t{i} \"quoted\""));
            let handles: Result<Vec<_>, Error> =
                names.map(|name| world.allreduce_async(&name, vec![1.0f32; 10], ReduceOp::Sum)).collect();
            handles?.into_iter().try_for_each(|handle| handle.wait().map(drop))?;
        }
        world.broadcast("b", &mut [1i64], 1)?;
        world.allgather("g", &[world.rank() as u8])?;
        let odd = vec![1.0f32; 1 + world.rank() % 2];
        assert!(matches!(world.allreduce_async("odd", odd, ReduceOp::Sum)?.wait(), Err(Error::Mismatch { .. })));
        world.shutdown()
    }) {
        result.expect("a peaceful end");
    }

    let events = events(&path);
    let slices = slices(&events);
    for rank in 0..size as u64 {
        for i in 0..5 {
            let steps = &slices[&(rank, format!("t{i} \"quoted\""))];
            assert_eq!(steps.len(), 4);
            for step in steps {
                assert_eq!((step.name.as_str(), &step.inside), ("ALLREDUCE", &stations("ALLREDUCE")));
            }
        }
        assert_eq!(slices[&(rank, "b".into())][0].inside, stations("BROADCAST"));
        assert_eq!(slices[&(rank, "g".into())][0].inside, stations("ALLGATHER"));
        let odd = &slices[&(rank, "odd".into())][0];
        assert_eq!(odd.inside, ["NEGOTIATE_ALLREDUCE"]);
        assert_eq!(odd.end["failed"], true);
        assert!(events.iter().any(|event| event["name"] == "ROUND" && event["pid"] == rank));
    }
    let detail = events.iter().find(|event| event["name"] == "BROADCAST").expect("the broadcast");
    assert_eq!(detail["args"], serde_json::json!({ "dtype": "i64", "shape": [1], "bytes": 8 }));
}

#[test]
fn a_timeline_starts_and_stops_at_any_time() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("part.json");
    let reduce = |world: &World, name: &str| world.allreduce(name, &mut [1.0f32], ReduceOp::Sum);
    for result in World::threads(2, |world| {
        reduce(&world, "before")?;
        world.start_timeline(&path, false)?;
        reduce(&world, "first")?;
        world.stop_timeline();
        reduce(&world, "between")?;
        world.start_timeline(&path, false)?;
        reduce(&world, "second")?;
        let lonely = match world.rank() {
            0 => Some(world.allreduce_async("lonely", vec![1.0f32], ReduceOp::Sum)?),
            _ => None,
        };
        world.stop_timeline();
        world.shutdown()?;
        drop(lonely);
        assert!(world.start_timeline("/nowhere/at/all.json", false).is_err());
        Ok::<(), Error>(())
    }) {
        result.expect("a peaceful end");
    }
    let slices = slices(&events(&path));
    let seen: BTreeSet<_> = slices.keys().map(|(_, tensor)| tensor.as_str()).collect();
    assert_eq!(seen, ["first", "lonely", "second"].into());
    assert_eq!(slices[&(0, "lonely".into())][0].end["under way"], true);
}
