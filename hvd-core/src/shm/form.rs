//! How the ranks of one host come to share a segment.
//!
//! Rank 0 makes the memory file and listens at an abstract Unix socket with a random name, then offers name and nonce to
//! all ranks in messages of the transport. A rank that reaches the socket, finds rank 0's user behind it and shows the
//! nonce is passed the file. That this succeeds *defines* "same host". Each rank votes, and rank 0 tells the verdict:
//! all or none. The socket and the file have no name in any file system and vanish with their last process.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use rustix::io::{Errno, IoSlice};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use super::segment::{self, Layout, Nonce, Segment};
use crate::error::Result;
use crate::transport::subset::channel;
use crate::transport::talk::Talk;
use crate::transport::{Tag, Transport};

/// The channel of the formation's messages.
const CHANNEL: u32 = channel::FORMATION;
const OFFER: Tag = Tag { channel: CHANNEL, sequence: 0 };
const VOTE: Tag = Tag { channel: CHANNEL, sequence: 1 };
const VERDICT: Tag = Tag { channel: CHANNEL, sequence: 2 };

/// The segment, if all ranks can map it.
pub(super) fn share(transport: &mut dyn Transport, slot_bytes: usize, deadline: Instant) -> Result<Option<Segment>> {
    let mut talk = Talk::new(transport, deadline, "tried to share memory");
    match talk.transport.rank() {
        0 => lead(&mut talk, slot_bytes),
        _ => follow(&mut talk),
    }
}

fn lead(talk: &mut Talk<'_>, slot_bytes: usize) -> Result<Option<Segment>> {
    let size = talk.transport.size();
    let host = Host::open(size, slot_bytes)
        .inspect_err(|error| {
            tracing::warn!("the ranks of this host cannot share memory and talk over TCP, which is slower: {error}")
        })
        .ok();
    let offer = host.as_ref().map(|host| host.offer.encode()).unwrap_or_default();
    talk.tell_all(OFFER, &offer)?;
    let Some(mut host) = host else { return Ok(None) };
    let mut all = true;
    for peer in 1..size {
        all &= talk.hear(peer, VOTE, || host.serve())? == [1];
    }
    talk.tell_all(VERDICT, &[all.into()])?;
    Ok(all.then_some(host.segment))
}

fn follow(talk: &mut Talk<'_>) -> Result<Option<Segment>> {
    let bytes = talk.hear(0, OFFER, || ())?;
    if bytes.is_empty() {
        return Ok(None);
    }
    let segment = match Offer::decode(&bytes) {
        Some(offer) => join(talk, &offer)?,
        None => None,
    };
    talk.tell(0, VOTE, &[segment.is_some().into()])?;
    let verdict = talk.hear(0, VERDICT, || ())?;
    Ok(segment.filter(|_| verdict == [1]))
}

/// Fetches the file and maps it. Gives up early enough to vote in time.
fn join(talk: &mut Talk<'_>, offer: &Offer) -> Result<Option<Segment>> {
    let Some(layout) = Layout::new(talk.transport.size(), offer.slot_bytes, offer.arena_bytes) else { return Ok(None) };
    let now = Instant::now();
    let patience = now + talk.deadline.saturating_duration_since(now) / 2;
    let mut guest = Guest::default();
    while Instant::now() < patience {
        match guest.fetch(offer) {
            Ok(file) => return Ok(Segment::map(file.as_fd(), layout, &offer.nonce).ok()),
            Err(Errno::AGAIN | Errno::INTR) => talk.nap()?,
            Err(error) => {
                tracing::debug!(%error, "not on the host of rank 0");
                return Ok(None);
            }
        }
    }
    Ok(None)
}

/// What rank 0 tells the others.
struct Offer {
    slot_bytes: usize,
    arena_bytes: usize,
    nonce: Nonce,
    name: [u8; 16],
}

impl Offer {
    const BYTES: usize = 8 + 8 + 16 + 16;

    fn encode(&self) -> Vec<u8> {
        let [slot, arena] = [self.slot_bytes, self.arena_bytes].map(|bytes| (bytes as u64).to_le_bytes());
        [&slot[..], &arena, &self.nonce, &self.name].concat()
    }

    fn decode(bytes: &[u8]) -> Option<Offer> {
        let bytes: &[u8; Offer::BYTES] = bytes.try_into().ok()?;
        let slot_bytes = u64::from_le_bytes(bytes[..8].try_into().ok()?).try_into().ok()?;
        let arena_bytes = u64::from_le_bytes(bytes[8..16].try_into().ok()?).try_into().ok()?;
        let (nonce, name) = (bytes[16..32].try_into().ok()?, bytes[32..].try_into().ok()?);
        Some(Offer { slot_bytes, arena_bytes, nonce, name })
    }

    fn address(&self) -> rustix::io::Result<SocketAddrUnix> {
        let hex: String = self.name.iter().map(|byte| format!("{byte:02x}")).collect();
        SocketAddrUnix::new_abstract_name(format!("hvd-{hex}").as_bytes())
    }
}

/// Messages with boundaries; nothing blocks.
fn socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
}

/// Whether the process at the other end is of this one's user.
fn is_kin(socket: &OwnedFd) -> bool {
    rustix::net::sockopt::socket_peercred(socket).is_ok_and(|peer| peer.uid == rustix::process::geteuid())
}

/// Rank 0's side: hands out the file.
struct Host {
    offer: Offer,
    file: OwnedFd,
    segment: Segment,
    listener: OwnedFd,
    /// Who has connected and not yet shown the nonce.
    guests: Vec<OwnedFd>,
    /// More connections than this are strangers'.
    most_guests: usize,
}

impl Host {
    fn open(size: usize, slot_bytes: usize) -> rustix::io::Result<Host> {
        let layout = Layout::for_this_host(size, slot_bytes).ok_or(Errno::INVAL)?;
        let (slot_bytes, arena_bytes) = (layout.slot_bytes(), layout.arena_bytes());
        let mut offer = Offer { slot_bytes, arena_bytes, nonce: Nonce::default(), name: Nonce::default() };
        getrandom::fill(&mut offer.nonce).map_err(|_| Errno::IO)?;
        getrandom::fill(&mut offer.name).map_err(|_| Errno::IO)?;
        let file = segment::create(layout, &offer.nonce)?;
        let segment = Segment::map(file.as_fd(), layout, &offer.nonce)?;
        let listener = socket()?;
        rustix::net::bind(&listener, &offer.address()?)?;
        rustix::net::listen(&listener, size.min(1024) as i32)?;
        Ok(Host { offer, file, segment, listener, guests: Vec::new(), most_guests: 2 * size })
    }

    /// Lets in who has come, and gives the file to those who have shown the nonce.
    fn serve(&mut self) {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        while self.guests.len() < self.most_guests {
            let Ok(guest) = rustix::net::accept_with(&self.listener, flags) else { break };
            if is_kin(&guest) {
                self.guests.push(guest);
            }
        }
        let Host { guests, offer, file, .. } = self;
        guests.retain(|guest| {
            let mut shown = [0; 17];
            match rustix::net::recv(guest, &mut shown, RecvFlags::empty()) {
                Ok((16, _)) if shown[..16] == offer.nonce => {
                    pass(guest, file).is_err_and(|error| error == Errno::AGAIN)
                }
                Err(Errno::AGAIN | Errno::INTR) => true,
                _ => false,
            }
        });
    }
}

/// Sends a file over a Unix socket, with one byte, as some byte has to go with it.
fn pass(guest: &OwnedFd, file: &OwnedFd) -> rustix::io::Result<usize> {
    let files = [file.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&files));
    rustix::net::sendmsg(guest, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)
}

/// The other ranks' side: fetches the file.
#[derive(Default)]
struct Guest {
    socket: Option<OwnedFd>,
}

impl Guest {
    /// Goes one step on; `AGAIN` says that it has to be called again.
    fn fetch(&mut self, offer: &Offer) -> rustix::io::Result<OwnedFd> {
        match &self.socket {
            Some(socket) => receive_file(socket),
            None => {
                let socket = socket()?;
                rustix::net::connect(&socket, &offer.address()?)?;
                if !is_kin(&socket) {
                    return Err(Errno::PERM);
                }
                rustix::net::send(&socket, &offer.nonce, SendFlags::NOSIGNAL)?;
                self.socket = Some(socket);
                Err(Errno::AGAIN)
            }
        }
    }
}

fn receive_file(socket: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut files = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    files.next().and_then(|mut files| files.next()).ok_or(Errno::BADMSG)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fetch(host: &mut Host, offer: &Offer) -> rustix::io::Result<OwnedFd> {
        let mut guest = Guest::default();
        for _ in 0..100 {
            match guest.fetch(offer) {
                Err(Errno::AGAIN) => host.serve(),
                other => return other,
            }
        }
        Err(Errno::AGAIN)
    }

    #[test]
    fn the_file_goes_to_who_knows_the_nonce_only() {
        let mut host = Host::open(2, 4096).unwrap();
        let offer = Offer::decode(&host.offer.encode()).unwrap();
        let file = fetch(&mut host, &offer).unwrap();
        assert!(Segment::map(file.as_fd(), Layout::new(2, 4096, offer.arena_bytes).unwrap(), &offer.nonce).is_ok());
        let stranger = Offer { nonce: [0; 16], ..offer };
        assert!(fetch(&mut host, &stranger).is_err());
        assert!(host.guests.is_empty());
    }

    #[test]
    fn strangers_who_say_nothing_are_few() {
        let mut host = Host::open(2, 4096).unwrap();
        let silent: Vec<_> = (0..10).map(|_| socket().unwrap()).collect();
        for socket in &silent {
            let _ = rustix::net::connect(socket, &host.offer.address().unwrap());
        }
        host.serve();
        assert!(host.guests.len() <= 4);
    }

    #[test]
    fn an_offer_of_another_length_is_refused() {
        assert!(Offer::decode(&[0; Offer::BYTES - 1]).is_none());
        assert!(Offer::decode(&[0; Offer::BYTES + 1]).is_none());
    }
}
