//! Messages from one rank to another.

#[path = "support/ranks.rs"]
mod ranks;

use hvd_core::{Error, ReduceOp, World};
use proptest::prelude::*;
use ranks::{Outcome, on_ranks, sum, tensor};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// All ranks to all others, both ways at once, several messages of a tag, collectives beside them.
    #[test]
    fn messages_arrive_in_order(
        size in 2usize..=5,
        lengths in prop::collection::vec(prop_oneof![Just(0usize), 1usize..100, Just(200_000usize)], 1..4),
    ) {
        on_ranks(size, |world| {
            let rank = world.rank();
            let others = || (0..size).filter(|&peer| peer != rank);
            let mut sends = Vec::new();
            for peer in others() {
                for (at, &length) in lengths.iter().enumerate() {
                    sends.push(world.send_async(peer, 7, tensor(rank + at, length))?);
                }
            }
            let handle = world.allreduce_async("beside", tensor(rank, 1000), ReduceOp::Sum)?;
            for peer in others() {
                for (at, &length) in lengths.iter().enumerate() {
                    let received: Vec<f64> = world.recv(peer, 7)?;
                    assert_eq!(received, tensor(peer + at, length), "from {peer}, message {at}");
                }
            }
            assert_eq!(handle.wait()?, sum(size, 1000));
            sends.into_iter().try_for_each(|send| send.wait().map(drop))
        });
    }
}

#[test]
fn two_sides_that_do_not_fit_hear_of_it_and_go_on() {
    on_ranks(2, |world| {
        let peer = 1 - world.rank();
        let mismatch = |result: Outcome<()>| match result {
            Err(Error::Mismatch { detail, .. }) => {
                assert!(detail.contains("rank 0 sends 3 f32") && detail.contains("rank 1 receives"), "{detail}");
            }
            other => panic!("{other:?}"),
        };
        match world.rank() {
            0 => {
                mismatch(world.send(peer, 1, &[1.0f32; 3]));
                mismatch(world.send(peer, 1, &[1.0f32; 3]));
                world.send(peer, 1, &[1.0f32; 3])
            }
            _ => {
                mismatch(world.recv_into(peer, 1, &mut [0.0f32; 4]));
                mismatch(world.recv::<f64>(peer, 1).map(drop));
                let mut data = [0.0f32; 3];
                world.recv_into(peer, 1, &mut data)?;
                assert_eq!(data, [1.0; 3]);
                Ok(())
            }
        }
    });
}

#[test]
fn a_peer_that_there_is_not_is_refused() {
    for size in [1, 2] {
        on_ranks(size, |world| {
            for peer in [world.rank(), size] {
                let result = world.send(peer, 0, &[1u8]);
                assert!(matches!(&result, Err(Error::Invalid(text)) if text.contains("no such peer")), "{result:?}");
            }
            Ok(())
        });
    }
}

#[test]
fn a_message_that_nobody_receives_is_an_error_and_no_hang() {
    let results = World::threads(2, |world| {
        let lonely = (world.rank() == 0).then(|| world.send_async(1, 0, vec![1u8]));
        let ended = world.shutdown();
        lonely.map_or(ended, |handle| handle.and_then(|handle| handle.wait()).map(drop))
    });
    let sent = &results[0];
    assert!(matches!(sent, Err(Error::PeerLost { rank: 1, .. } | Error::ShutDown(_))), "{sent:?}");
}
