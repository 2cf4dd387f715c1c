//! The loops behind the functions of [`super`].

use std::marker::PhantomData;

use crate::simd::{F16c, Isa, Kernel};
use crate::wire::lane::{Finish, GROUP, Lane, Number};

/// Elements whose results are gathered at a time: their accumulators (at most 8 bytes each) stay in the first-level
/// cache beside the inputs.
const BLOCK: usize = 1024;

/// How two elements become one.
pub(super) trait Combine<N> {
    fn apply(first: N, second: N) -> N;
}

macro_rules! combine {
    ($($name:ident => $method:ident),*) => {$(
        pub(super) enum $name {}
        impl<N: Number> Combine<N> for $name {
            #[inline(always)]
            fn apply(first: N, second: N) -> N {
                first.$method(second)
            }
        }
    )*};
}

combine!(Plus => plus, Times => times, Least => least, Greatest => greatest);

/// `into = into ∘ from`.
pub(super) struct Accumulate<'a, L: Lane, O> {
    pub into: &'a mut [L::Bytes],
    pub from: &'a [L::Bytes],
    pub op: PhantomData<O>,
}

impl<L: Lane, O: Combine<L::Wide>> Kernel for Accumulate<'_, L, O> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        let (mut into, mut from) = (self.into, self.from);
        if let Some(f16c) = L::in_groups::<I>() {
            let (groups, rest) = into.as_chunks_mut::<GROUP>();
            let (others, other_rest) = from.as_chunks::<GROUP>();
            for (group, other) in groups.iter_mut().zip(others) {
                let mut sums = L::load_group(f16c, group);
                apply_group::<L, O>(&mut sums, &L::load_group(f16c, other));
                L::store_group(f16c, &sums, group);
            }
            (into, from) = (rest, other_rest);
        }
        for (into, from) in into.iter_mut().zip(from) {
            *into = L::store(O::apply(L::load(*into), L::load(*from)));
        }
    }
}

/// `out = finish(inputs[0] ∘ inputs[1] ∘ …)`, block by block.
pub(super) struct Gather<'a, L: Lane, O, F> {
    pub out: &'a mut [L::Bytes],
    pub inputs: &'a [&'a [u8]],
    pub finish: F,
    pub op: PhantomData<O>,
}

impl<L: Lane, O: Combine<L::Wide>, F: Finish<L::Wide>> Kernel for Gather<'_, L, O, F> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        let Gather { mut out, inputs, finish, .. } = self;
        let mut done = 0;
        if let Some(f16c) = L::in_groups::<I>() {
            let (groups, rest) = out.as_chunks_mut::<GROUP>();
            done = groups.len() * GROUP;
            gather_groups::<L, O, F>(f16c, groups, inputs, finish);
            out = rest;
        }
        let mut sums = [L::Wide::default(); BLOCK];
        for (index, out) in out.chunks_mut(BLOCK).enumerate() {
            let begin = done + index * BLOCK;
            let at = begin..begin + out.len();
            let input = |rank: usize| &bytemuck::cast_slice::<u8, L::Bytes>(inputs[rank])[at.clone()];
            match inputs.len() {
                1 => one::<L, F>(out, input(0), finish),
                2 => two::<L, O, F>(out, input(0), input(1), finish),
                more => {
                    let sums = &mut sums[..out.len()];
                    start::<L, O>(sums, input(0), input(1));
                    for rank in 2..more - 1 {
                        add::<L, O>(sums, input(rank));
                    }
                    end::<L, O, F>(out, sums, input(more - 1), finish);
                }
            }
        }
    }
}

/// `first = second = finish(first ∘ second)`.
pub(super) struct Meet<'a, L: Lane, O, F> {
    pub first: &'a mut [L::Bytes],
    pub second: &'a mut [L::Bytes],
    pub finish: F,
    pub op: PhantomData<O>,
}

impl<L: Lane, O: Combine<L::Wide>, F: Finish<L::Wide>> Kernel for Meet<'_, L, O, F> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        let (mut first, mut second) = (self.first, self.second);
        if let Some(f16c) = L::in_groups::<I>() {
            let (firsts, first_rest) = first.as_chunks_mut::<GROUP>();
            let (seconds, second_rest) = second.as_chunks_mut::<GROUP>();
            for (first, second) in firsts.iter_mut().zip(seconds) {
                let mut sums = L::load_group(f16c, first);
                apply_group::<L, O>(&mut sums, &L::load_group(f16c, second));
                finish_group(&mut sums, self.finish);
                L::store_group(f16c, &sums, first);
                *second = *first;
            }
            (first, second) = (first_rest, second_rest);
        }
        for (first, second) in first.iter_mut().zip(second) {
            *first = L::store(self.finish.apply(O::apply(L::load(*first), L::load(*second))));
            *second = *first;
        }
    }
}

/// Whole groups, each through all inputs while it is in a register.
#[inline(always)]
fn gather_groups<L: Lane, O: Combine<L::Wide>, F: Finish<L::Wide>>(
    f16c: F16c,
    out: &mut [[L::Bytes; GROUP]],
    inputs: &[&[u8]],
    finish: F,
) {
    let group = |rank: usize, at: usize| -> &[L::Bytes; GROUP] {
        &bytemuck::cast_slice::<u8, L::Bytes>(inputs[rank]).as_chunks::<GROUP>().0[at]
    };
    for (at, out) in out.iter_mut().enumerate() {
        let mut sums = L::load_group(f16c, group(0, at));
        for rank in 1..inputs.len() {
            apply_group::<L, O>(&mut sums, &L::load_group(f16c, group(rank, at)));
        }
        finish_group(&mut sums, finish);
        L::store_group(f16c, &sums, out);
    }
}

#[inline(always)]
fn apply_group<L: Lane, O: Combine<L::Wide>>(sums: &mut [L::Wide; GROUP], next: &[L::Wide; GROUP]) {
    for (sum, next) in sums.iter_mut().zip(next) {
        *sum = O::apply(*sum, *next);
    }
}

#[inline(always)]
fn finish_group<N: Number>(sums: &mut [N; GROUP], finish: impl Finish<N>) {
    for sum in sums {
        *sum = finish.apply(*sum);
    }
}

#[inline(always)]
fn one<L: Lane, F: Finish<L::Wide>>(out: &mut [L::Bytes], only: &[L::Bytes], finish: F) {
    for (out, only) in out.iter_mut().zip(only) {
        *out = L::store(finish.apply(L::load(*only)));
    }
}

#[inline(always)]
fn two<L: Lane, O: Combine<L::Wide>, F: Finish<L::Wide>>(
    out: &mut [L::Bytes],
    first: &[L::Bytes],
    second: &[L::Bytes],
    finish: F,
) {
    for ((out, first), second) in out.iter_mut().zip(first).zip(second) {
        *out = L::store(finish.apply(O::apply(L::load(*first), L::load(*second))));
    }
}

#[inline(always)]
fn start<L: Lane, O: Combine<L::Wide>>(sums: &mut [L::Wide], first: &[L::Bytes], second: &[L::Bytes]) {
    for ((sum, first), second) in sums.iter_mut().zip(first).zip(second) {
        *sum = O::apply(L::load(*first), L::load(*second));
    }
}

#[inline(always)]
fn add<L: Lane, O: Combine<L::Wide>>(sums: &mut [L::Wide], next: &[L::Bytes]) {
    for (sum, next) in sums.iter_mut().zip(next) {
        *sum = O::apply(*sum, L::load(*next));
    }
}

#[inline(always)]
fn end<L: Lane, O: Combine<L::Wide>, F: Finish<L::Wide>>(
    out: &mut [L::Bytes],
    sums: &[L::Wide],
    last: &[L::Bytes],
    finish: F,
) {
    for ((out, sum), last) in out.iter_mut().zip(sums).zip(last) {
        *out = L::store(finish.apply(O::apply(*sum, L::load(*last))));
    }
}
