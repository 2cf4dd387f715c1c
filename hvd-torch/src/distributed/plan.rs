//! Which parameters share a bucket: a pure function of the parameters and the limits.

use tch::{Device, Kind, Tensor};

/// Each gradient begins at a multiple of so many bytes, which suits vector loads and stores.
const ALIGNMENT_BYTES: usize = 64;

/// What of a parameter matters to the plan.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub elements: usize,
    pub kind: Kind,
    pub device: Device,
    /// The group that the parameter was put in.
    pub group: Option<usize>,
}

impl Shape {
    pub(super) fn of(tensor: &Tensor, group: Option<usize>) -> Self {
        Shape { elements: tensor.numel(), kind: tensor.kind(), device: tensor.device(), group }
    }

    fn element_bytes(&self) -> usize {
        self.kind.elt_size_in_bytes()
    }

    /// Elements from this gradient's beginning to the next one's.
    fn stride(&self) -> usize {
        self.elements.next_multiple_of((ALIGNMENT_BYTES / self.element_bytes()).max(1))
    }
}

/// Where in a bucket a parameter's gradient lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The parameter's number in the optimizer's order.
    pub param: usize,
    /// First element.
    pub offset: usize,
}

/// A bucket to be made.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct BucketPlan {
    pub kind: Kind,
    pub device: Device,
    pub group: Option<usize>,
    pub places: Vec<Place>,
    pub elements: usize,
}

/// Limits on the sizes of buckets. A gradient that is larger than its limit gets a bucket for itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// The first bucket of each kind is smaller, so that the first reduction starts early.
    pub first_bytes: usize,
    pub bytes: usize,
}

/// Fills buckets in reverse order of registration, which is about the order in which backward produces gradients.
/// Parameters of different kinds, devices or groups never share a bucket; those of one group always do, whatever its size.
pub(super) fn plan(params: &[Shape], limits: Limits) -> Vec<BucketPlan> {
    let mut buckets: Vec<BucketPlan> = Vec::new();
    // For each kind and device, the bucket that is being filled and its limit.
    let mut open: Vec<(usize, usize)> = Vec::new();
    for (param, shape) in params.iter().enumerate().rev() {
        let same =
            |bucket: &BucketPlan| (bucket.kind, bucket.device, bucket.group) == (shape.kind, shape.device, shape.group);
        let slot = open.iter_mut().find(|(at, _)| same(&buckets[*at]));
        let Shape { kind, device, group, .. } = *shape;
        let new = BucketPlan { kind, device, group, places: Vec::new(), elements: 0 };
        let at = match slot {
            Some((at, limit)) => {
                let bytes = (buckets[*at].elements + shape.elements) * shape.element_bytes();
                if bytes > *limit && group.is_none() {
                    (*at, *limit) = (buckets.len(), limits.bytes);
                    buckets.push(new);
                }
                *at
            }
            None => {
                open.push((buckets.len(), limits.first_bytes.min(limits.bytes)));
                buckets.push(new);
                buckets.len() - 1
            }
        };
        let bucket = &mut buckets[at];
        bucket.places.push(Place { param, offset: bucket.elements });
        bucket.elements += shape.stride();
    }
    buckets
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shape(elements: usize, kind: Kind) -> Shape {
        Shape { elements, kind, device: Device::Cpu, group: None }
    }

    fn params_of(bucket: &BucketPlan) -> Vec<usize> {
        bucket.places.iter().map(|place| place.param).collect()
    }

    #[test]
    fn reverse_order_with_a_small_first_bucket() {
        let params = [shape(100, Kind::Float); 6];
        let plan = plan(&params, Limits { first_bytes: 500, bytes: 1000 });
        assert_eq!(plan.iter().map(params_of).collect::<Vec<_>>(), [vec![5], vec![4, 3], vec![2, 1], vec![0]]);
        // 100 elements of 4 bytes, rounded up to whole 64 bytes.
        assert_eq!(plan[1].places[1].offset, 112);
    }

    #[test]
    fn kinds_keep_apart_and_large_gradients_stand_alone() {
        let params =
            [shape(10, Kind::Float), shape(10, Kind::BFloat16), shape(100_000, Kind::Float), shape(10, Kind::Float)];
        let plan = plan(&params, Limits { first_bytes: 1000, bytes: 1000 });
        assert_eq!(plan.iter().map(params_of).collect::<Vec<_>>(), [vec![3], vec![2], vec![1], vec![0]]);
    }

    #[test]
    fn a_group_shares_a_bucket_and_nobody_else_does() {
        let mut params = [shape(1000, Kind::Float); 5];
        (params[1].group, params[3].group) = (Some(0), Some(0));
        let plan = plan(&params, Limits { first_bytes: 100_000, bytes: 100_000 });
        assert_eq!(plan.iter().map(params_of).collect::<Vec<_>>(), [vec![4, 2, 0], vec![3, 1]]);
    }

    proptest! {
        #[test]
        fn each_gradient_has_its_own_place(
            sizes in prop::collection::vec((0usize..3000, prop::bool::ANY), 0..40),
            first in 0usize..5000,
            bytes in 1usize..20000,
        ) {
            let kind = |half| if half { Kind::BFloat16 } else { Kind::Double };
            let params: Vec<_> = sizes.iter().map(|(n, half)| shape(*n, kind(*half))).collect();
            let mut seen = vec![0; params.len()];
            for bucket in plan(&params, Limits { first_bytes: first, bytes }) {
                let mut end = 0;
                for place in &bucket.places {
                    seen[place.param] += 1;
                    prop_assert!(place.offset >= end);
                    prop_assert_eq!(params[place.param].kind, bucket.kind);
                    end = place.offset + params[place.param].elements;
                }
                prop_assert!(end <= bucket.elements);
            }
            prop_assert!(seen.iter().all(|count| *count == 1));
        }
    }
}
